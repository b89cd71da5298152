"""Paged causal attention of prefill chunks: keys and values, cached and new, come from the cache.

A program takes some tokens of one chunk with all query heads of one kv head, so that each key is
read once for the whole group, and walks over the context in tiles at absolute positions. A row's
bits do not depend on the chunk that it is in: tiles that it does not see add an exact zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.dependent import dot
from agentrt.kernels.paged import load_tile

LARGEST_TILE = 128  # keys
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(
    query,
    key_cache,
    value_cache,
    table,
    start,
    end,
    limit,  # [M]: the last token that a row sees
    largest,
    weight_sum,
    acc,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys and values, by online softmax (Milakov, Gimelshein 2018)."""
    tokens = start + tl.arange(0, TILE)
    keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    scores = dot(query, tl.trans(keys), tl.zeros([M, TILE], tl.float32))
    if MASKED:
        scores = tl.where(tokens[None, :] <= limit[:, None], scores, float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1) * (scale * _LOG2_E))
    weights = tl.exp2(scores * (scale * _LOG2_E) - peak[:, None])
    shrink = tl.exp2(largest - peak)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    values = load_tile(value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    acc = dot(weights.to(query.dtype), values, acc * shrink[:, None])
    return peak, weight_sum, acc


@triton.jit(do_not_specialize=["prefix", "num_rows_all"])
def prefill_attention_kernel(
    qkv,  # [rows, (heads + 2 * kv_heads) * D], queries turned
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [rows, heads * D]
    tables,  # [slots, TABLE]
    tiles,  # [programs, 4]: first row, its position, number of rows (0: nothing to do), slot
    prefix_out,  # [kv_heads, rows * group, D], if PREFIX: attention to the first `prefix` tokens
    prefix_lse,  # [kv_heads, rows * group], its log-sum-exp
    prefix,  # a multiple of TILE
    num_rows_all,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    GP: tl.constexpr,  # query heads of a kv head, padded to a power of two
    M: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PREFIX: tl.constexpr,
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
    limit = first_position + token
    end = first_position + num_rows
    whole = (first_position + 1) // TILE * TILE  # every row sees the tiles before
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if PREFIX:
        cell = (kv_head * num_rows_all + first_row + token).to(tl.int64) * G + group
        largest = tl.load(prefix_lse + cell, mask=alive, other=0.0) * _LOG2_E
        weight_sum += 1.0
        acc = tl.load(
            prefix_out + cell[:, None] * D + columns[None, :], mask=alive[:, None], other=0.0
        ).to(tl.float32)
    for start in tl.range(prefix, whole, TILE, num_stages=STAGES):
        largest, weight_sum, acc = _step(
            query,
            key_cache,
            value_cache,
            table,
            start,
            whole,
            limit,
            largest,
            weight_sum,
            acc,
            kv_head,
            scale,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            M,
            False,
        )
    for start in tl.range(whole, end, TILE, num_stages=1):
        largest, weight_sum, acc = _step(
            query,
            key_cache,
            value_cache,
            table,
            start,
            end,
            limit,
            largest,
            weight_sum,
            acc,
            kv_head,
            scale,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            M,
            True,
        )
    result = acc / weight_sum[:, None]
    tl.store(
        out + (rows[:, None] * HEADS + head[:, None]) * D + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=alive[:, None],
    )


@frozen
class PrefillTiles:
    """Rows of the M side (tokens times padded group), keys of a tile, stages, warps."""

    rows: int
    keys: int
    num_stages: int
    num_warps: int

    @classmethod
    def choose(cls, dim: int, num_tokens: int, kv_heads: int, group: int) -> PrefillTiles:
        """Narrower tiles where the chunk is too short to give every multiprocessor work."""
        padded = triton.next_power_of_2(group)
        short = num_tokens * padded * kv_heads < 128 * 132
        if dim <= 64:
            return cls(64, 128, 3, 4) if short else cls(128, 64, 3, 8)
        return cls(64, 128, 3, 4) if short else cls(256, 64, 3, 8)


def plan_tiles(
    chunks: list[tuple[int, int, int, int]], group: int, rows: int
) -> list[tuple[int, int, int, int]]:
    """Cut chunks (first row, position, number of rows, slot) into tiles, the longest work first."""
    step = max(1, rows // triton.next_power_of_2(group))
    tiles = [
        (first + i, position + i, min(step, number - i), slot)
        for first, position, number, slot in chunks
        for i in range(0, number, step)
    ]
    return sorted(tiles, key=lambda tile: -tile[1])


@frozen
class Prefix:
    """Attention of every row to the first `num_tokens` tokens of one context, done already."""

    out: Tensor  # [kv_heads, rows * group, dim]
    lse: Tensor  # [kv_heads, rows * group], float32
    num_tokens: int


def prefill_attention(
    qkv: Tensor,
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    out: Tensor,  # [rows, heads * dim]
    tables: Tensor,
    tiles: Tensor,  # [programs, 4], int32
    shape: PrefillTiles,
    prefix: Prefix | None = None,
) -> Tensor:
    """Attention of the chunks that `tiles` describes; their keys are in the cache already."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads = out.shape[1] // dim
    prefill_attention_kernel[(kv_heads, tiles.shape[0])](
        qkv,
        kv[0],
        kv[1],
        out,
        tables,
        tiles,
        out if prefix is None else prefix.out,
        tables if prefix is None else prefix.lse,
        0 if prefix is None else prefix.num_tokens,
        qkv.shape[0],
        dim**-0.5,
        heads,
        kv_heads,
        dim,
        block_tokens,
        tables.shape[1],
        triton.next_power_of_2(heads // kv_heads),
        shape.rows,
        shape.keys,
        shape.num_stages,
        prefix is not None,
        num_warps=shape.num_warps,
    )
    return out
