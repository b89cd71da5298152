"""Decode attention of several rows in a persistent step: units of their contexts, a kv head each.

The units and the arithmetic are those of `decode_attention_kernel`. Which unit is a program's first
one is found before the barrier, and its first keys and values are asked for in the L2 cache. Most
often it is the only one: see `fitting_capacity`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.attention_unit import attend_unit, locate
from agentrt.kernels.dependent import prefetch_where
from agentrt.kernels.persistent_grid import announce, await_all
from agentrt.kernels.rotary import angles_at


@triton.jit
def fitting_capacity(
    starts,
    batch,
    KV_HEADS: tl.constexpr,
    BP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The capacity to `locate` by, and how many units there are then, of all kv heads. Each row's
    last unit may be a short one, so that units are more than `PROGRAMS`, and someone has two: then
    the others are made longer, until all are done at once."""
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=0, cache_modifier=".cg")
    ends = tl.load(starts + 1 + index, mask=there, other=0, cache_modifier=".cg")
    all_tiles = tl.max(ends, 0) * KV_HEADS
    num_rows = tl.sum((ends > firsts).to(tl.int32), 0)
    capacity = tl.cast(PROGRAMS, tl.int32)
    tiles_each = tl.maximum((all_tiles + capacity - 1) // capacity, 1)
    num_units = tl.sum((ends - firsts + tiles_each - 1) // tiles_each, 0) * KV_HEADS
    fewer = PROGRAMS - num_rows * KV_HEADS
    if (num_units > PROGRAMS) & (fewer > 0):
        capacity = fewer
        tiles_each = (all_tiles + capacity - 1) // capacity
        num_units = tl.sum((ends - firsts + tiles_each - 1) // tiles_each, 0) * KV_HEADS
    return capacity, num_units


@triton.jit
def _prefetch_tile(
    item,
    part,
    tiles_each,
    position,
    slot,
    tables,
    key_cache,
    value_cache,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A unit's first keys and values into the L2 cache, as many bytes a thread."""
    NUMBERS: tl.constexpr = TILE * D // THREADS
    threads = tl.arange(0, THREADS)
    token = part * tiles_each * TILE + threads * NUMBERS // D
    block = tl.load(
        tables + slot.to(tl.int64) * TABLE + token // BLOCK_TOKENS, mask=token < position
    )
    row = (block.to(tl.int64) * KV_HEADS + item % KV_HEADS) * BLOCK_TOKENS + token % BLOCK_TOKENS
    cells = row * D + threads * NUMBERS % D
    num_bytes: tl.constexpr = NUMBERS * (key_cache.dtype.element_ty.primitive_bitwidth // 8)
    prefetch_where(key_cache + cells, num_bytes, token < position)
    prefetch_where(value_cache + cells, num_bytes, token < position)


@triton.jit(noinline=True)
def batch_attention_phase(
    program,
    polls,
    barrier,
    failed,
    capacity,  # and `num_items`, from `fitting_capacity`
    num_items,
    slots,  # and what follows, as in `decode_attention_kernel`
    positions,
    starts,
    tables,
    cos,
    sin,
    qkv,
    key_cache,
    value_cache,
    out,
    query_norm,
    key_norm,
    partial,
    peaks,
    counters,
    batch,
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
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SYNC: tl.constexpr,
):
    """A barrier, and one layer's attention behind it. Returns the polls that are left."""
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    if SYNC:
        seen = announce(barrier, program, PROGRAMS)
    row, part, num_units, tiles_each, position, slot, place = locate(
        program // KV_HEADS, slots, positions, starts, batch, capacity, KV_HEADS, BP
    )
    # Registers would do it half a microsecond sooner, but there are none for it.
    if PREFETCH and program < num_items:
        _prefetch_tile(
            program,
            part,
            tiles_each,
            position,
            slot,
            tables,
            key_cache,
            value_cache,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TABLE,
            TILE,
            THREADS,
        )
    if SYNC:
        polls = await_all(barrier, seen, polls, failed)
    for item in tl.range(program, num_items, PROGRAMS, num_stages=1):
        kv_head = item % KV_HEADS
        table = tables + slot.to(tl.int64) * TABLE
        start = part * tiles_each * TILE
        cosines, sines = angles_at(cos, sin, position, D)
        attend_unit(
            cosines,
            cosines,
            qkv + row.to(tl.int64) * WIDTH,
            key_cache,
            value_cache,
            out + (row.to(tl.int64) * HEADS + kv_head * G) * D,
            table,
            tl.load(table + position // BLOCK_TOKENS).to(tl.int64),
            position,
            start,
            tl.minimum(start + tiles_each * TILE, position),
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
            False,
        )
        if item + PROGRAMS < num_items:
            row, part, num_units, tiles_each, position, slot, place = locate(
                (item + PROGRAMS) // KV_HEADS,
                slots,
                positions,
                starts,
                batch,
                capacity,
                KV_HEADS,
                BP,
            )
    return polls
