"""Attention whose sums have one order whoever computes them: decode rows, and rows of a chunk.

A context is cut at every SPLIT tokens, counted from its begin. A split's tiles are added up one
after another by online softmax (Milakov, Gimelshein 2018), from nothing; splits are then merged in
ascending order, always by the same formula: by a program that has the whole context, in its
registers, or by the last to arrive of those that share it. Queries are the M side of `wgmma`, at
least 64 rows for decoding too, of which most are empty: an instruction computes each on its own.
What a row does not see is exactly nothing: weights of zero, and factors of one.

Queries are turned, and keys and values appended, before (`append_heads`), for all rows alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.dependent import dot
from agentrt.kernels.paged import load_tile

SPLIT = 256  # tokens, a multiple of every tile
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_tile(
    query,  # [M, D]
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
    """One more tile of a split. Masked or not, a row that sees all of it gets the same bits."""
    tokens = start + tl.arange(0, TILE)
    keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    scores = dot(query, tl.trans(keys), tl.zeros([M, TILE], tl.float32))
    if MASKED:
        scores = tl.where(tokens[None, :] <= limit[:, None], scores, float("-inf"))
    factor = scale * _LOG2_E
    peak = tl.maximum(largest, tl.max(scores, 1) * factor)
    finite = peak
    if MASKED:  # a row may have seen nothing yet
        finite = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(tl.fma(scores, factor, -finite[:, None]))
    shrink = tl.exp2(largest - finite)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    values = load_tile(value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
    acc = dot(weights.to(query.dtype), values, acc * shrink[:, None])
    return peak, weight_sum, acc


@triton.jit
def merge(largest, weight_sum, acc, split_largest, split_sum, split_acc):
    """One more split of a context: one in which a row sees nothing leaves it as it is."""
    peak = tl.maximum(largest, split_largest)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    shrink, factor = tl.exp2(largest - finite), tl.exp2(split_largest - finite)
    weight_sum = weight_sum * shrink + split_sum * factor
    acc = acc * shrink[:, None] + split_acc * factor[:, None]
    return peak, weight_sum, acc


@triton.jit
def _close_split(
    split,
    is_alone,
    largest,
    weight_sum,
    acc,
    split_largest,
    split_sum,
    split_acc,
    partial,
    peaks,
    first_share,
    SHARED: tl.constexpr,
    STEP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    SM: tl.constexpr,  # rows of M that are kept
):
    """Merge a finished split with those before; or, where programs share the context, keep it."""
    if SHARED:
        if is_alone:
            largest, weight_sum, acc = merge(
                largest, weight_sum, acc, split_largest, split_sum, split_acc
            )
        else:
            rows = tl.arange(0, M)
            place = (first_share + split * STEP).to(tl.int64)
            cells = (place * SM + rows[:, None]) * D + tl.arange(0, D)[None, :]
            tl.store(partial + cells, split_acc, mask=(rows < SM)[:, None])
            tl.store(peaks + place * (2 * SM) + rows, split_largest, mask=rows < SM)
            tl.store(peaks + place * (2 * SM) + SM + rows, split_sum, mask=rows < SM)
    else:
        largest, weight_sum, acc = merge(
            largest, weight_sum, acc, split_largest, split_sum, split_acc
        )
    return largest, weight_sum, acc


@triton.jit
def attend(
    query,
    key_cache,
    value_cache,
    table,
    begin,  # a multiple of SPLIT
    end,
    limit,
    whole,  # every row sees all tokens before this multiple of TILE
    kv_head,
    scale,
    is_alone,
    partial,
    peaks,
    first_share,
    SHARED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    SM: tl.constexpr,
):
    """Attention to tokens begin .. end: the merged splits, if this program has all of them."""
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    split_largest = tl.full([M], float("-inf"), tl.float32)
    split_sum = tl.zeros([M], tl.float32)
    split_acc = tl.zeros([M, D], tl.float32)
    # A program that shares a context waits for no second loop: its masks cost it nothing.
    unmasked_end = end if SHARED else whole
    for start in tl.range(begin, unmasked_end, TILE, num_stages=STAGES):
        split_largest, split_sum, split_acc = _attend_tile(
            query,
            key_cache,
            value_cache,
            table,
            start,
            unmasked_end,
            limit,
            split_largest,
            split_sum,
            split_acc,
            kv_head,
            scale,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
            TILE,
            M,
            SHARED,
        )
        if (start + TILE) % SPLIT_TOKENS == 0:
            largest, weight_sum, acc = _close_split(
                start // SPLIT_TOKENS,
                is_alone,
                largest,
                weight_sum,
                acc,
                split_largest,
                split_sum,
                split_acc,
                partial,
                peaks,
                first_share,
                SHARED,
                KV_HEADS,
                M,
                D,
                SM,
            )
            split_largest = tl.full([M], float("-inf"), tl.float32)
            split_sum = tl.zeros([M], tl.float32)
            split_acc = tl.zeros([M, D], tl.float32)
    if not SHARED:
        for start in tl.range(whole, end, TILE, num_stages=1):
            split_largest, split_sum, split_acc = _attend_tile(
                query,
                key_cache,
                value_cache,
                table,
                start,
                end,
                limit,
                split_largest,
                split_sum,
                split_acc,
                kv_head,
                scale,
                KV_HEADS,
                D,
                BLOCK_TOKENS,
                TILE,
                M,
                True,
            )
            if (start + TILE) % SPLIT_TOKENS == 0:
                largest, weight_sum, acc = merge(
                    largest, weight_sum, acc, split_largest, split_sum, split_acc
                )
                split_largest = tl.full([M], float("-inf"), tl.float32)
                split_sum = tl.zeros([M], tl.float32)
                split_acc = tl.zeros([M, D], tl.float32)
    if (end + TILE - 1) // TILE * TILE % SPLIT_TOKENS != 0:  # the last split is open
        largest, weight_sum, acc = _close_split(
            end // SPLIT_TOKENS,
            is_alone,
            largest,
            weight_sum,
            acc,
            split_largest,
            split_sum,
            split_acc,
            partial,
            peaks,
            first_share,
            SHARED,
            KV_HEADS,
            M,
            D,
            SM,
        )
    return largest, weight_sum, acc


def tile_of(dim: int) -> int:
    """Tokens of a tile: they decide the bits, and so follow the head's size alone."""
    return 128 if dim <= 64 else 64
