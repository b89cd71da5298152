"""Decode attention of one row in a persistent step: a unit of the context and a kv head a program.

The arithmetic is that of `decode_attention_kernel`, by the same functions. Which unit is a
program's is found once, and not once a layer; and the first tile of keys and values is fetched
before the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.attention_unit import attend_unit
from agentrt.kernels.paged import load_tile
from agentrt.kernels.persistent_grid import again, announce, await_all
from agentrt.kernels.rotary import angles_at


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
        attend_unit(
            keys,
            values,
            qkv,
            key_cache,
            value_cache,
            out + kv_head * G * D,
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
            counters + kv_head,
            program,
            eps,
            eps,
            eps,
            scale,
            HEADS,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            1,
            NORM,
            GP,
            THREADS,
        )
    return polls
