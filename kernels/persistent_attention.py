"""Decode attention of one row in a persistent step: a unit of the context and a kv head a program.

The arithmetic is that of `decode_attention_kernel`, by the same functions. Which unit is a
program's is found once, and not once a layer; and the first tile of keys and values is fetched
before the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.attention_shares import attend_tile, merge_shares, store_share
from agentrt.kernels.dependent import arrive
from agentrt.kernels.paged import load_tile
from agentrt.kernels.persistent_grid import again, announce, await_all
from agentrt.kernels.rotary import angles_at, load_heads, rotate

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_unit(
    program,
    num_tiles,
    KV_HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Which of a row's units is the program's, how many there are, and the tiles of each. With
    `PROGRAMS` rounded down to whole units of all kv heads, no program has more than one."""
    CAPACITY: tl.constexpr = PROGRAMS // KV_HEADS * KV_HEADS
    tiles_each = tl.maximum((num_tiles * KV_HEADS + CAPACITY - 1) // CAPACITY, 1)
    num_units = (num_tiles + tiles_each - 1) // tiles_each
    return program // KV_HEADS, num_units, tiles_each


@triton.jit
def attention_phase(
    program,
    polls,
    barrier,
    failed,
    part,  # and what else `locate_unit` found
    num_units,
    tiles_each,
    position,
    own_block,
    table,
    cos,  # [context, D / 2]
    sin,
    qkv,  # [(heads + 2 * kv_heads) * D]
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [heads * D]
    query_norm,  # [D], if NORM
    key_norm,
    partial,  # as in `decode_attention_kernel`
    peaks,
    counters,
    eps,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    GP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    SYNC: tl.constexpr,
):
    """A barrier, and one layer's attention behind it. Returns the polls that are left."""
    G: tl.constexpr = HEADS // KV_HEADS
    M: tl.constexpr = 16 if GP < 16 else GP
    program = again(program)
    if SYNC:
        seen = announce(barrier, program, PROGRAMS)
    kv_head = program % KV_HEADS
    start = part * tiles_each * TILE
    end = tl.minimum(start + tiles_each * TILE, position)
    end = tl.where(part < num_units, end, start)  # without a unit of its own, nothing is fetched
    keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True)
    values = load_tile(
        value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
    )
    # Kept from layer to layer, these would take registers from every phase.
    cosines, sines = angles_at(cos, sin, position, D)
    if SYNC:
        polls = await_all(barrier, seen, polls, failed)
    if part < num_units:
        group = tl.arange(0, M)
        columns = tl.arange(0, D)
        tokens = tl.arange(0, TILE)
        one = tl.arange(0, 1)
        has_own = part == num_units - 1
        # All loads of what the phase before has made at once.
        query_values, query_turned = load_heads(qkv + (kv_head * G + group) * D, group < G, D)
        key_at = qkv + (HEADS + kv_head) * D + one
        own_values, own_turned = load_heads(key_at, (one == 0) & has_own, D)
        own_value = tl.load(
            key_at + KV_HEADS * D + columns, mask=(columns >= 0) & has_own, other=0.0
        )
        query = rotate(query_values, query_turned, query_norm, cosines, sines, eps, D, NORM).to(
            qkv.dtype.element_ty
        )
        largest = tl.full([M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
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
        if has_own:
            key = rotate(own_values, own_turned, key_norm, cosines, sines, eps, D, NORM)
            key = key.to(key_cache.dtype.element_ty)
            value = own_value.to(value_cache.dtype.element_ty)
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
        target = out + kv_head * G * D
        if num_units == 1:
            result = acc / weight_sum[:, None]
            tl.store(
                target + group[:, None] * D + columns[None, :],
                result.to(out.dtype.element_ty),
                mask=(group < G)[:, None],
            )
        else:
            store_share(partial, peaks, program, acc, largest, weight_sum, M, D, GP)
            if arrive(counters + kv_head, num_units):
                merge_shares(
                    target, partial, peaks, kv_head, num_units, KV_HEADS, D, G, GP, THREADS
                )
    return polls
