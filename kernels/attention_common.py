"""Decode attention of rows whose contexts begin with the same blocks: agents of one system prompt.

What they have in common is read once for several rows: the tensor cores take at least 16 query
rows, and a row of the batch has fewer heads for a kv head. So a unit (see `attention_decode`) is
either of one row, behind what is common, or of common tiles, for as many rows as fit: their shares
are added by whoever is the last of a row to arrive. (Hydragen, Juravsky et al. 2024, and cascade
inference in FlashInfer split attention in the same way, in launches of their own.)

Rows that have something in common come first in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.attention_shares import attend_tile, merge_shares
from agentrt.kernels.attention_unit import attend_unit
from agentrt.kernels.dependent import arrive, start_next, wait_previous
from agentrt.kernels.paged import load_tile
from agentrt.kernels.rotary import angles_at, load_heads, rotate, row_angles

QUERY_ROWS = 16  # of the tensor cores: what a common unit serves, heads times rows


@triton.jit
def _locate(
    unit,
    slots,
    positions,
    starts,
    common,
    batch,
    capacity,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BP: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Of a unit, where those of common tiles come first: its row (the first of its rows), which of
    the row's units it is and how many these are, its tokens, the row's position and slot, and
    whether it is one of the common ones; then how many rows have something in common, and of all
    rows the first place and the number of units. See `attention_unit.locate`."""
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=0, cache_modifier=".cg")
    ends = tl.load(starts + 1 + index, mask=there, other=0, cache_modifier=".cg")
    all_positions = tl.load(positions + index, mask=there, other=0, cache_modifier=".cg")
    all_slots = tl.load(slots + index, mask=there, other=0, cache_modifier=".cg")
    num_common = tl.load(common, cache_modifier=".cg")
    common_tiles = tl.load(common + 1, cache_modifier=".cg")
    groups = (num_common + MEMBERS - 1) // MEMBERS
    all_tiles = tl.max(ends, 0) + groups * common_tiles
    tiles_each = tl.maximum((all_tiles * KV_HEADS + capacity - 1) // capacity, 1)
    common_parts = (common_tiles + tiles_each - 1) // tiles_each
    num_shared = groups * common_parts
    is_common = unit < num_shared
    shared = tl.where(index < num_common, common_parts, 0)
    own = (ends - firsts + tiles_each - 1) // tiles_each
    units = own + shared
    whole = (ends - firsts) // tiles_each
    num_whole = tl.sum(whole, 0)
    ordinal = unit - num_shared
    is_rest = ordinal >= num_whole
    ordinal -= tl.where(is_rest, num_whole, 0)
    counted = tl.where(is_rest, own - whole, whole)
    until = tl.cumsum(counted, 0)
    # The parts of one tile side by side: who comes second finds it in the cache.
    group = unit % tl.maximum(groups, 1)
    row = tl.where(is_common, group * MEMBERS, tl.sum((until <= ordinal).to(tl.int32), 0))
    here = index == row
    num_units = tl.sum(tl.where(here, units, 0), 0)
    before = tl.sum(tl.where(here, until - counted, 0), 0)
    own_part = tl.sum(tl.where(here, shared, 0), 0) + ordinal - before
    own_part = tl.where(is_rest, num_units - 1, own_part)
    part = tl.where(is_common, unit // tl.maximum(groups, 1), own_part)
    position = tl.sum(tl.where(here, all_positions, 0), 0)
    slot = tl.sum(tl.where(here, all_slots, 0), 0)
    first_places = tl.cumsum(units, 0) - units
    ahead = tl.where(row < num_common, common_tiles, 0)  # of the row's own tiles
    own_tile = ahead + (part - tl.sum(tl.where(here, shared, 0), 0)) * tiles_each
    start = tl.where(is_common, part * tiles_each, own_tile) * TILE
    end = tl.minimum(start + tiles_each * TILE, tl.where(is_common, common_tiles * TILE, position))
    return (
        row,
        part,
        num_units,
        start,
        end,
        position,
        slot,
        is_common,
        num_common,
        first_places,
        units,
    )


@triton.jit
def _attend_common(
    keys,  # the first tile, and `values`
    values,
    qkv,
    key_cache,
    value_cache,
    out,
    table,
    positions,
    row,  # the first of those that the unit serves
    num_common,
    start,
    end,
    kv_head,
    part,
    first_places,  # [BP], of rows
    units,  # [BP]
    cos,
    sin,
    query_norm,
    partial,
    peaks,
    counters,
    eps,
    scale,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GP: tl.constexpr,
    MEMBERS: tl.constexpr,
    THREADS: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    M: tl.constexpr = MEMBERS * GP
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    cells = tl.arange(0, M)
    rows = row + cells // GP
    group = cells % GP
    columns = tl.arange(0, D)
    tokens = tl.arange(0, TILE)
    alive = rows < num_common
    at = tl.load(positions + rows, mask=alive, other=0, cache_modifier=".cg")
    heads = qkv + rows.to(tl.int64) * WIDTH + (kv_head * G + group) * D
    query_values, query_turned = load_heads(heads, alive & (group < G), D)
    cosines, sines = row_angles(cos, sin, at, D)
    query = rotate(query_values, query_turned, query_norm, cosines, sines, eps, D, NORM).to(
        qkv.dtype.element_ty
    )
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    largest, weight_sum, acc = attend_tile(
        query, keys, values, start + tokens < end, largest, weight_sum, acc, scale, M, TILE
    )
    for first in tl.range(start + TILE, end, TILE, num_stages=STAGES):
        largest, weight_sum, acc = attend_tile(
            query,
            load_tile(key_cache, table, first, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
            load_tile(value_cache, table, first, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
            first + tokens < end,
            largest,
            weight_sum,
            acc,
            scale,
            M,
            TILE,
        )
    index = tl.arange(0, BP)
    is_row = index[None, :] == rows[:, None]
    places = tl.sum(tl.where(is_row, first_places[None, :], 0), 1) + part
    shares = (places * KV_HEADS + kv_head) * GP
    tl.store(partial + (shares + group)[:, None] * D + columns[None, :], acc, mask=alive[:, None])
    tl.store(peaks + 2 * shares + group, largest, mask=alive)
    tl.store(peaks + 2 * shares + GP + group, weight_sum, mask=alive)
    for one in tl.range(row, tl.minimum(row + MEMBERS, num_common), 1, num_stages=1):
        num_units = tl.sum(tl.where(index == one, units, 0), 0)
        if arrive(counters + one * KV_HEADS + kv_head, num_units):
            lowest = tl.sum(tl.where(index == one, first_places, 0), 0) * KV_HEADS + kv_head
            target = out + (one.to(tl.int64) * HEADS + kv_head * G) * D
            merge_shares(target, partial, peaks, lowest, num_units, KV_HEADS, D, G, GP, THREADS)


@triton.jit(
    do_not_specialize=["batch", "capacity"],
    do_not_specialize_on_alignment=["slots", "positions", "starts", "common"],
)
def common_attention_kernel(
    qkv,  # this and what follows: as in `decode_attention_kernel`
    key_cache,
    value_cache,
    out,
    tables,
    slots,
    positions,
    starts,  # of the tiles behind what is common
    common,  # [2]: how many rows have something in common, and how many tiles
    cos,
    sin,
    query_norm,
    key_norm,
    partial,
    peaks,
    counters,
    batch,
    capacity,
    eps,
    scale,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GP: tl.constexpr,
    MEMBERS: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    start_next(PDL)
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    (
        row,
        part,
        num_units,
        start,
        end,
        position,
        slot,
        is_common,
        num_common,
        first_places,
        units,
    ) = _locate(
        program // KV_HEADS,
        slots,
        positions,
        starts,
        common,
        batch,
        capacity,
        KV_HEADS,
        TILE,
        BP,
        MEMBERS,
    )
    if num_units == 0:
        if program == 0:
            wait_previous(PDL)
        return
    cosines, sines = angles_at(cos, sin, position, D)
    table = tables + slot.to(tl.int64) * TABLE
    keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True)
    values = load_tile(
        value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
    )
    own_block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
    wait_previous(PDL)
    if is_common:
        _attend_common(
            keys,
            values,
            qkv,
            key_cache,
            value_cache,
            out,
            table,
            positions,
            row,
            num_common,
            start,
            end,
            kv_head,
            part,
            first_places,
            units,
            cos,
            sin,
            query_norm,
            partial,
            peaks,
            counters,
            eps,
            scale,
            BP,
            HEADS,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            STAGES,
            NORM,
            GP,
            MEMBERS,
            THREADS,
        )
    else:
        index = tl.arange(0, BP)
        place = tl.sum(tl.where(index == row, first_places, 0), 0) + part
        attend_unit(
            keys,
            values,
            qkv + row.to(tl.int64) * WIDTH,
            key_cache,
            value_cache,
            out + (row.to(tl.int64) * HEADS + kv_head * G) * D,
            table,
            own_block,
            position,
            start,
            end,
            kv_head,
            part,
            num_units,
            query_norm,
            key_norm,
            cosines,
            sines,
            partial,
            peaks,
            counters + row * KV_HEADS + kv_head,
            place * KV_HEADS + kv_head,
            eps,
            eps,
            eps,
            scale,
            HEADS,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            STAGES,
            NORM,
            GP,
            THREADS,
        )
