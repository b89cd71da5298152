"""Parts of decode attention: one tile, and the shares of programs that have one row together."""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.dependent import dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(
    query,
    keys,
    values,
    there,  # [TILE]
    largest,
    weight_sum,
    acc,
    scale,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile, by online softmax (Milakov, Gimelshein 2018). It may hold no token at all."""
    scores = dot(query, tl.trans(keys.to(query.dtype)), tl.zeros([M, TILE], tl.float32))
    scores = tl.where(there[None, :], scores * (scale * _LOG2_E), float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(largest - finite)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    acc = dot(weights.to(query.dtype), values.to(query.dtype), acc * shrink[:, None])
    return peak, weight_sum, acc


@triton.jit
def store_share(
    partial,
    peaks,
    place,
    acc,
    largest,
    weight_sum,
    M: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
):
    """Keep a program's sums until all of its row's are there."""
    group = tl.arange(0, M)
    cells = (place * GP + group[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(partial + cells, acc, mask=(group < GP)[:, None])
    tl.store(peaks + place * (2 * GP) + group, largest, mask=group < GP)
    tl.store(peaks + place * (2 * GP) + GP + group, weight_sum, mask=group < GP)


@triton.jit
def merge_shares(
    out,
    partial,
    peaks,
    first,
    number,
    STEP: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Add a row's shares, at places `first`, `first + STEP`, ..., a fixed number at a time, in
    ascending order."""
    AT_ONCE: tl.constexpr = 32 * THREADS // (GP * D) if GP * D < 32 * THREADS else 1
    shares = tl.arange(0, AT_ONCE)
    group = tl.arange(0, GP)
    columns = tl.arange(0, D)
    largest = tl.full([GP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    for start in tl.range(0, number, AT_ONCE, num_stages=1):
        index = start + shares
        there = index < number
        at = first + index * STEP
        cells = at[:, None] * (2 * GP) + group[None, :]
        high = tl.load(
            peaks + cells, mask=there[:, None], other=float("-inf"), cache_modifier=".cg"
        )
        sums = tl.load(peaks + cells + GP, mask=there[:, None], other=0.0, cache_modifier=".cg")
        cells = (at[:, None, None] * GP + group[None, :, None]) * D + columns[None, None, :]
        parts = tl.load(partial + cells, mask=there[:, None, None], other=0.0, cache_modifier=".cg")
        peak = tl.maximum(largest, tl.max(high, 0))
        factors = tl.exp2(high - peak[None, :])
        shrink = tl.exp2(largest - peak)
        weight_sum = weight_sum * shrink + tl.sum(sums * factors, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * factors[:, :, None], 0)
        largest = peak
    result = acc / weight_sum[:, None]
    tl.store(
        out + group[:, None] * D + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=(group < G)[:, None],
    )
