"""One unit of decode attention: some consecutive tiles of a row's context, for one kv head.

It is what a program of `attention_decode` does, and, several times a step, one of `persistent`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.attention_shares import attend_tile, merge_shares, store_share
from agentrt.kernels.dependent import arrive
from agentrt.kernels.narrow import half_query, narrowed
from agentrt.kernels.narrow_decode import as_pairs, attend_pairs
from agentrt.kernels.paged import load_tile
from agentrt.kernels.rotary import load_heads, rotate

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(
    unit,
    slots,
    positions,
    starts,
    batch,
    capacity,
    KV_HEADS: tl.constexpr,
    BP: tl.constexpr,
):
    """Of a unit: its row, which of the row's units it is and how many these are (none if there is
    no such unit), the tiles of a unit, the row's position and slot, and the unit's place where a
    row's units follow one another. All that is loaded is loaded at once: a load that waits for
    another would take half a microsecond more.

    Whole units come before what is left of each row, which fills the gaps when they end: 8 rows of
    16,384 tokens took 202 us on an H100 (dim 128), not 208.
    """
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=0, cache_modifier=".cg")
    ends = tl.load(starts + 1 + index, mask=there, other=0, cache_modifier=".cg")
    all_positions = tl.load(positions + index, mask=there, other=0, cache_modifier=".cg")
    all_slots = tl.load(slots + index, mask=there, other=0, cache_modifier=".cg")
    tiles_each = tl.maximum((tl.max(ends, 0) * KV_HEADS + capacity - 1) // capacity, 1)
    units = (ends - firsts + tiles_each - 1) // tiles_each
    whole = (ends - firsts) // tiles_each
    num_whole = tl.sum(whole, 0)
    is_rest = unit >= num_whole
    ordinal = unit - tl.where(is_rest, num_whole, 0)
    counted = tl.where(is_rest, units - whole, whole)
    until = tl.cumsum(counted, 0)
    row = tl.sum((until <= ordinal).to(tl.int32), 0)
    here = index == row
    num_units = tl.sum(tl.where(here, units, 0), 0)
    before = tl.sum(tl.where(here, until - counted, 0), 0)
    part = tl.where(is_rest, num_units - 1, ordinal - before)
    place = tl.sum(tl.where(index < row, units, 0), 0) + part
    position = tl.sum(tl.where(here, all_positions, 0), 0)
    slot = tl.sum(tl.where(here, all_slots, 0), 0)
    return row, part, num_units, tiles_each, position, slot, place


@triton.jit
def attend_unit(
    keys,  # the first tile [TILE, W], and `values`, if FETCHED; they may hold no token
    values,
    line,  # the row of qkv: its heads, [(heads + 2 * kv_heads) * D]
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    target,  # [G * D], of the row and the kv head
    table,  # of the row
    own_block,  # of its own token, which stands at `position`
    position,
    start,  # tokens of the unit
    end,
    kv_head,
    part,  # which of the row's units it is
    num_units,
    query_norm,  # [D], if NORM
    key_norm,
    cosines,  # [1, D]
    sines,
    partial,  # [places, GP, D] scratch, float32
    peaks,  # [places, 2, GP]: the largest score (log2), and the sum of the weights
    counter,  # of the row and kv head, zero
    place,  # the unit's own; those of the row's other units are KV_HEADS apart
    key_scale,  # of a cache of 8 bits: see `narrow`
    value_scale,
    eps,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GP: tl.constexpr,
    THREADS: tl.constexpr,
    FETCHED: tl.constexpr = True,
):
    """Who has a row's last unit also appends its key and value; who is the last of a row to get
    here adds what all have found."""
    G: tl.constexpr = HEADS // KV_HEADS
    M: tl.constexpr = 16 if GP < 16 else GP
    NARROW: tl.constexpr = key_cache.dtype.element_ty == tl.float8e4nv
    group = tl.arange(0, M)
    columns = tl.arange(0, D)
    tokens = tl.arange(0, TILE)
    one = tl.arange(0, 1)
    has_own = part == num_units - 1
    # All loads of what the kernel before has made at once: each takes most of a microsecond.
    query_values, query_turned = load_heads(line + (kv_head * G + group) * D, group < G, D)
    key_at = line + (HEADS + kv_head) * D + one
    own_values, own_turned = load_heads(key_at, (one == 0) & has_own, D)
    own_value = tl.load(key_at + KV_HEADS * D + columns, mask=(columns >= 0) & has_own, other=0.0)
    query = rotate(query_values, query_turned, query_norm, cosines, sines, eps, D, NORM).to(
        line.dtype.element_ty
    )
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if NARROW:
        query = half_query(query)
        largest, weight_sum, acc = attend_pairs(
            query,
            keys,
            values,
            as_pairs(key_cache),
            as_pairs(value_cache),
            table,
            start,
            end,
            kv_head,
            scale,
            KV_HEADS,
            BLOCK_TOKENS,
            D,
            M,
            TILE,
            STAGES,
        )
    elif STAGES == 1:
        for at in tl.range(start, end, TILE, num_stages=1):
            # The next tile comes into registers while this one is worked on.
            next_keys = load_tile(
                key_cache, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )
            next_values = load_tile(
                value_cache, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )
            largest, weight_sum, acc = attend_tile(
                query,
                keys,
                values,
                at + tokens < end,
                largest,
                weight_sum,
                acc,
                scale,
                M,
                TILE,
            )
            keys, values = next_keys, next_values
    else:
        first = start
        if FETCHED:
            first += TILE
            largest, weight_sum, acc = attend_tile(
                query,
                keys,
                values,
                start + tokens < end,
                largest,
                weight_sum,
                acc,
                scale,
                M,
                TILE,
            )
        for at in tl.range(first, end, TILE, num_stages=STAGES):
            largest, weight_sum, acc = attend_tile(
                query,
                load_tile(key_cache, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
                load_tile(value_cache, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
                at + tokens < end,
                largest,
                weight_sum,
                acc,
                scale,
                M,
                TILE,
            )
    if has_own:
        key = rotate(own_values, own_turned, key_norm, cosines, sines, eps, D, NORM)
        value = own_value
        if NARROW:  # what later tokens will read
            key, value = narrowed(key, key_scale), narrowed(value, value_scale)
        key = key.to(key_cache.dtype.element_ty)
        value = value.to(value_cache.dtype.element_ty)
        cell = (own_block * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
        tl.store(key_cache + cell * D + one[:, None] * 0 + columns[None, :], key)
        tl.store(value_cache + cell * D + columns, value)
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (scale * _LOG2_E)
        peak = tl.maximum(largest, score)
        shrink = tl.exp2(largest - peak)
        weight = tl.exp2(score - peak)
        weight_sum = weight_sum * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
        largest = peak
    if NARROW:
        acc *= value_scale
    if num_units == 1:
        result = acc / weight_sum[:, None]
        tl.store(
            target + group[:, None] * D + columns[None, :],
            result.to(target.dtype.element_ty),
            mask=(group < G)[:, None],
        )
    else:
        store_share(partial, peaks, place, acc, largest, weight_sum, M, D, GP)
        if arrive(counter, num_units):
            lowest = place - part * KV_HEADS
            merge_shares(target, partial, peaks, lowest, num_units, KV_HEADS, D, G, GP, THREADS)
