"""Reading keys and values of a paged context, for the Triton attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_at(table, index, there):
    """A block id, as two halves: a load of less than 32 bits is no asynchronous copy. As one, it
    would take a stage of the pipeline, and leave no second tile in flight (Triton 3.6)."""
    halves = table.to(tl.pointer_type(tl.uint16)) + 2 * index
    low = tl.load(halves, mask=there, other=0).to(tl.int64)
    return low + tl.load(halves + 1, mask=there, other=0).to(tl.int64) * 65536


@triton.jit
def tile_pointers(
    cache,
    table,
    start,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pointers [TILE, D] to keys or values of a context from `start` on, a multiple of TILE; those
    from `end` on may point anywhere."""
    offsets = tl.arange(0, TILE)
    if TILE <= BLOCK_TOKENS:
        block = block_at(table, start // BLOCK_TOKENS, start < end)
        cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + start % BLOCK_TOKENS + offsets
    else:
        block = tl.zeros([TILE], tl.int64)
        for i in tl.static_range(TILE // BLOCK_TOKENS):
            token = start + i * BLOCK_TOKENS
            one = block_at(table, token // BLOCK_TOKENS, token < end)
            block = tl.where(offsets // BLOCK_TOKENS == i, one, block)
        cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + offsets % BLOCK_TOKENS
    return cache + cells[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def load_tile(
    cache,
    table,
    start,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    NOW: tl.constexpr = False,
):
    """Keys or values [TILE, D] of a paged context from `start` on, zero from `end` on.

    NOW, outside of a loop: into registers, past the first cache, which may hold what an earlier
    kernel read there before the memory changed.
    """
    pointers = tile_pointers(cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    there = start + tl.arange(0, TILE) < end
    modifier: tl.constexpr = ".cg" if NOW else ""
    return tl.load(pointers, mask=there[:, None], other=0.0, cache_modifier=modifier)
