"""Prefill attention in one order (see `ordered_attention`): a program has a whole context."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels.attention_prefill import PrefillTiles
from agentrt.kernels.exact import exact_options
from agentrt.kernels.ordered_attention import SPLIT, attend, tile_of


@triton.jit
def ordered_prefill_kernel(
    qkv,  # [rows, (heads + 2 * kv_heads) * D], queries turned
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [rows, heads * D]
    tables,  # [slots, TABLE]
    tiles,  # [programs, 4]: first row, its position, number of rows (0: nothing to do), slot
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    kv_head = tl.program_id(0)
    description = tiles + tl.program_id(1) * 4
    first_row = tl.load(description)
    first_position = tl.load(description + 1)
    num_rows = tl.load(description + 2)
    if num_rows == 0:
        return
    table = tables + tl.load(description + 3).to(tl.int64) * TABLE
    cells = tl.arange(0, M)
    token = cells // GP
    group = cells % GP
    columns = tl.arange(0, D)
    alive = (token < num_rows) & (group < G)
    rows = (first_row + token).to(tl.int64)
    head = kv_head * G + group
    query = tl.load(
        qkv + rows[:, None] * WIDTH + head[:, None] * D + columns[None, :],
        mask=alive[:, None],
        other=0.0,
    )
    _, weight_sum, acc = attend(
        query,
        key_cache,
        value_cache,
        table,
        0,
        first_position + num_rows,
        first_position + token,
        (first_position + 1) // TILE * TILE,
        kv_head,
        scale,
        True,
        out,
        out,
        0,
        False,
        KV_HEADS,
        D,
        BLOCK_TOKENS,
        TILE,
        SPLIT_TOKENS,
        STAGES,
        M,
        M,
    )
    tl.store(
        out + (rows[:, None] * HEADS + head[:, None]) * D + columns[None, :],
        (acc / weight_sum[:, None]).to(out.dtype.element_ty),
        mask=alive[:, None],
    )


def ordered_tiles(dim: int, num_tokens: int, kv_heads: int, group: int) -> PrefillTiles:
    """How a chunk is cut: the rows of a tile may follow the chunk, its keys may not. With dim 256
    the two sums, of a context and of a split, are more than the registers hold."""
    padded = triton.next_power_of_2(group)
    is_short = num_tokens * padded * kv_heads < 128 * 132
    rows, warps = (64, 4) if is_short or dim > 128 else (128, 8)
    return PrefillTiles(rows, tile_of(dim), 2 if dim > 128 else 3, warps)


def ordered_prefill(
    qkv: Tensor,
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    out: Tensor,  # [rows, heads * dim]
    tables: Tensor,
    tiles: Tensor,  # [programs, 4], int32
    shape: PrefillTiles,  # from `ordered_tiles`
) -> Tensor:
    """Attention of the chunks that `tiles` describes; their keys are in the cache already."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads = out.shape[1] // dim
    assert shape.keys == tile_of(dim)
    ordered_prefill_kernel[(kv_heads, tiles.shape[0])](
        qkv,
        kv[0],
        kv[1],
        out,
        tables,
        tiles,
        dim**-0.5,
        heads,
        kv_heads,
        dim,
        block_tokens,
        tables.shape[1],
        triton.next_power_of_2(heads // kv_heads),
        shape.rows,
        shape.keys,
        SPLIT,
        shape.num_stages,
        num_warps=shape.num_warps,
        **exact_options(False),
    )
    return out
