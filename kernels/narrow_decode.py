"""What decode attention does in another way where keys and values are 8-bit floats (see `narrow`).

Two neighbours of a row are read as one number of 16 bits, as tensor cores and shared memory take
them, and are taken apart in registers: tiles of single bytes would be put together byte by byte.
Even and odd columns then have products of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.dependent import INTERPRETED, dot
from agentrt.kernels.paged import load_tile

_LOG2_E = tl.constexpr(1.4426950408889634)
# A float16 with the bits of an e4m3, moved to the same places, is that much smaller.
PAIR_FACTOR = tl.constexpr(256.0)


@triton.jit
def as_pairs(cache):
    """A pointer to two numbers at once."""
    return cache.to(tl.pointer_type(tl.int16))


@triton.jit
def take_apart(pairs):
    """The first and the second numbers of pairs, as float16, PAIR_FACTOR times too small."""
    if INTERPRETED:
        first = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
        second = (pairs & -0x8000) | ((pairs & 0x7F00) >> 1)
        first, second = first.to(tl.int16), second.to(tl.int16)
        return first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, b;
            prmt.b32 a, $2, 0, 0x2404;
            shr.u32 b, a, 1;
            and.b32 a, a, 0x80008000;
            lop3.b32 $0, b, 0x3F803F80, a, 0xEA;
            shr.u32 b, $2, 1;
            and.b32 a, $2, 0x80008000;
            lop3.b32 $1, b, 0x3F803F80, a, 0xEA;
        }
        """,
        "=&r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def split_columns(rows, M: tl.constexpr, D: tl.constexpr):
    """Even and odd columns [M, D / 2] of rows [M, D]."""
    return tl.split(tl.reshape(rows, [M, D // 2, 2]))


@triton.jit
def _attend_pairs(
    first_query,
    second_query,
    keys,
    values,
    there,  # [TILE]
    largest,
    weight_sum,
    first,
    second,
    scale,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile, see `attention_shares.attend_tile`."""
    first_keys, second_keys = take_apart(tl.trans(keys))
    scores = dot(first_query, first_keys, tl.zeros([M, TILE], tl.float32))
    scores = dot(second_query, second_keys, scores)
    scores = tl.where(there[None, :], scores * (scale * _LOG2_E), float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(largest - finite)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    weights = weights.to(tl.float16)
    first_values, second_values = take_apart(values)
    first = dot(weights, first_values, first * shrink[:, None])
    second = dot(weights, second_values, second * shrink[:, None])
    return peak, weight_sum, first, second


@triton.jit
def attend_pairs(
    query,  # [M, D], float16
    keys,  # [TILE, D / 2], and `values`: pairs of the first tile
    values,
    key_pairs,  # as load_tile takes them
    value_pairs,
    table,
    start,
    end,
    kv_head,
    scale,  # of scores with keys as they are stored
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The whole context from `start` to `end`: the largest score, the sum of weights, and the sums
    of values as they are stored [M, D]."""
    W: tl.constexpr = D // 2
    first_query, second_query = split_columns(query, M, D)
    tokens = tl.arange(0, TILE)
    scale *= PAIR_FACTOR
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    first = tl.zeros([M, W], tl.float32)
    second = tl.zeros([M, W], tl.float32)
    if STAGES == 1:
        for at in tl.range(start, end, TILE, num_stages=1):
            next_keys = load_tile(
                key_pairs, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE, True
            )
            next_values = load_tile(
                value_pairs, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE, True
            )
            largest, weight_sum, first, second = _attend_pairs(
                first_query,
                second_query,
                keys,
                values,
                at + tokens < end,
                largest,
                weight_sum,
                first,
                second,
                scale,
                M,
                TILE,
            )
            keys, values = next_keys, next_values
    else:
        largest, weight_sum, first, second = _attend_pairs(
            first_query,
            second_query,
            keys,
            values,
            start + tokens < end,
            largest,
            weight_sum,
            first,
            second,
            scale,
            M,
            TILE,
        )
        for at in tl.range(start + TILE, end, TILE, num_stages=STAGES):
            largest, weight_sum, first, second = _attend_pairs(
                first_query,
                second_query,
                load_tile(key_pairs, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE),
                load_tile(value_pairs, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE),
                at + tokens < end,
                largest,
                weight_sum,
                first,
                second,
                scale,
                M,
                TILE,
            )
    return largest, weight_sum, tl.reshape(tl.join(first, second), [M, D]) * PAIR_FACTOR
