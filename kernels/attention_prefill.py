"""Paged causal attention of prefill chunks: keys and values, cached and new, come from the cache.

A program takes some tokens of one chunk with all query heads of one kv head, so that each key is
read once for the whole group, and walks over the context in tiles at absolute positions. A row's
bits do not depend on the chunk that it is in: tiles that it does not see add an exact zero. But
where a short chunk leaves multiprocessors idle, several programs share a tile's context, and the
last of them to arrive adds what each has found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.dependent import arrive, dot
from agentrt.kernels.narrow import half_query, load_scales
from agentrt.kernels.paged import load_tile

LARGEST_TILE = 128  # keys
MOST_SPLITS = 8
# Of a short chunk: rows, keys, stages, warps, and how many programs share the work. 200 rows after
# 16,384 tokens take 105 us a layer with dim 64 (144 unshared), 165 with dim 128 (220 unshared).
SHORT_64 = (64, 128, 3, 4, 264)
SHORT_128 = (64, 64, 3, 4, 264)
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
    scores = dot(query, tl.trans(keys.to(query.dtype)), tl.zeros([M, TILE], tl.float32))
    if MASKED:
        scores = tl.where(tokens[None, :] <= limit[:, None], scores, float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1) * (scale * _LOG2_E))
    finite = peak
    if MASKED:  # a row may have seen nothing yet
        finite = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores * (scale * _LOG2_E) - finite[:, None])
    shrink = tl.exp2(largest - finite)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    values = load_tile(value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    acc = dot(weights.to(query.dtype), values.to(query.dtype), acc * shrink[:, None])
    return peak, weight_sum, acc


@triton.jit(do_not_specialize=["prefix", "num_rows_all"], do_not_specialize_on_alignment=["scales"])
def prefill_attention_kernel(
    qkv,  # [rows, (heads + 2 * kv_heads) * D], queries turned
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [rows, heads * D]
    tables,  # [slots, TABLE]
    tiles,  # [programs, 4]: first row, its position, number of rows (0: nothing to do), slot
    prefix_out,  # [kv_heads, rows * group, D], if PREFIX: attention to the first `prefix` tokens
    prefix_lse,  # [kv_heads, rows * group], its log-sum-exp
    partial,  # [tiles, kv_heads, SPLITS, M, D] scratch, if SPLITS > 1
    peaks,  # [tiles, kv_heads, SPLITS, 2, M]: the largest score (log2), and the sum of weights
    counters,  # [tiles, kv_heads], zero
    scales,  # [2, kv_heads], if the cache is 8 bits wide: see `narrow`
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
    SPLITS: tl.constexpr,  # programs that share a tile's context
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
    NARROW: tl.constexpr = key_cache.dtype.element_ty == tl.float8e4nv
    if NARROW:
        key_scale, value_scale = load_scales(scales, kv_head, KV_HEADS)
        query = half_query(query)
        scale *= key_scale
    limit = first_position + token
    end = first_position + num_rows
    whole = (first_position + 1) // TILE * TILE  # every row sees the tiles before
    begin = prefix
    if SPLITS > 1:
        num_tiles = (end + TILE - 1) // TILE
        begin = num_tiles * tl.program_id(2) // SPLITS * TILE
        end = tl.minimum(end, num_tiles * (tl.program_id(2) + 1) // SPLITS * TILE)
        whole = tl.minimum(whole, end)
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
    for start in tl.range(begin, whole, TILE, num_stages=STAGES):
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
    for start in tl.range(tl.maximum(begin, whole), end, TILE, num_stages=1):
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
    if SPLITS > 1:
        share = tl.program_id(1) * KV_HEADS + kv_head
        place = share * SPLITS + tl.program_id(2)
        inside = cells[:, None] * D + columns[None, :]
        tl.store(partial + place.to(tl.int64) * (M * D) + inside, acc)
        tl.store(peaks + place * (2 * M) + cells, largest)
        tl.store(peaks + place * (2 * M) + M + cells, weight_sum)
        if not arrive(counters + share, SPLITS):
            return
        largest = tl.full([M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        for split in tl.range(0, SPLITS, 1, num_stages=1):  # in ascending order, who was last
            place = share * SPLITS + split
            high = tl.load(peaks + place * (2 * M) + cells, cache_modifier=".cg")
            part_sum = tl.load(peaks + place * (2 * M) + M + cells, cache_modifier=".cg")
            part = tl.load(partial + place.to(tl.int64) * (M * D) + inside, cache_modifier=".cg")
            peak = tl.maximum(largest, high)
            finite = tl.where(peak == float("-inf"), 0.0, peak)
            shrink, factor = tl.exp2(largest - finite), tl.exp2(high - finite)
            weight_sum = weight_sum * shrink + part_sum * factor
            acc = acc * shrink[:, None] + part * factor[:, None]
            largest = peak
    if NARROW:
        acc *= value_scale
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
    splits: int = 1  # programs that share a tile's context

    @classmethod
    def choose(cls, dim: int, num_tokens: int, kv_heads: int, group: int) -> PrefillTiles:
        """Narrower tiles where the chunk is too short to give every multiprocessor work, and
        several programs a tile where even those are too few."""
        padded = triton.next_power_of_2(group)
        short = num_tokens * padded * kv_heads < 128 * 132
        if short:
            rows, keys, stages, warps, at_once = SHORT_64 if dim <= 64 else SHORT_128
            num_programs = max(1, triton.cdiv(num_tokens * padded, rows) * kv_heads)
            return cls(rows, keys, stages, warps, max(1, min(MOST_SPLITS, at_once // num_programs)))
        return cls(128, 64, 3, 8) if dim <= 64 else cls(256, 64, 3, 8)


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
    """Attention of every row to the first `num_tokens` tokens of one context, done already. Of a
    pool of 8 bits, the sums of values as they are stored."""

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
    counters: Tensor | None = None,
    scales: Tensor | None = None,  # [2, kv_heads], of a pool of 8 bits: see `narrow`
) -> Tensor:
    """Attention of the chunks that `tiles` describes; their keys are in the cache already.
    `counters` [tiles * kv_heads], int32 and zero, is for tiles that programs share."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads = out.shape[1] // dim
    splits = shape.splits if prefix is None and counters is not None else 1
    partial = peaks = out
    if splits > 1:
        shares = tiles.shape[0] * kv_heads * splits * shape.rows
        partial = torch.empty(shares * dim, dtype=torch.float32, device=out.device)
        peaks = torch.empty(2 * shares, dtype=torch.float32, device=out.device)
    prefill_attention_kernel[(kv_heads, tiles.shape[0], splits)](
        qkv,
        kv[0],
        kv[1],
        out,
        tables,
        tiles,
        out if prefix is None else prefix.out,
        tables if prefix is None else prefix.lse,
        partial,
        peaks,
        tiles if counters is None else counters,
        peaks if scales is None else scales,
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
        splits,
        num_warps=shape.num_warps,
    )
    return out
