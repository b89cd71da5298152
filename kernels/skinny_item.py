"""The stages of a product of a few rows (see `skinny`): what a program does with one item.

A tile is 64 rows of the weight; an item is a tile's part of K, where K is split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.dependent import arrive, dot, prefetch
from agentrt.kernels.gemv import ADD, GATE_UP
from agentrt.kernels.widen import widened

_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)
_THREADS = tl.constexpr(128)


@triton.jit
def load_squares(squares, rows, alive, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """Of batch rows: the partial sums of squares [PARTS, STRIDE], padded to a power of two."""
    P2: tl.constexpr = triton.next_power_of_2(PARTS)
    parts = tl.arange(0, P2)
    return tl.load(
        squares + parts[:, None] * STRIDE + rows[None, :],
        mask=(parts[:, None] < PARTS) & alive[None, :],
        other=0.0,
    )


@triton.jit
def weight_row(tile, lane, N: tl.constexpr, KIND: tl.constexpr):
    """Which row of the weight a lane of a tile reads; those beyond the end read the last."""
    R: tl.constexpr = 64
    if KIND == _GATE_UP:  # 32 rows of the gate, then the same 32 of up
        row = tl.minimum(tile * (R // 2) + lane % (R // 2), N - 1) + lane // (R // 2) * N
    else:
        row = tl.minimum(tile * R + lane, N - 1)
    return row


@triton.jit
def prefetch_item(
    item,
    weight,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    """The first columns of a program's weights, into the L2 cache: two threads a row. No more than
    what the pipeline will ask for next: all programs' weights together would push one another out
    of the cache."""
    R: tl.constexpr = 64
    KP: tl.constexpr = K // SPLITS
    threads = tl.arange(0, _THREADS)
    row = weight_row(item // SPLITS, threads % R, N, KIND)
    AHEAD: tl.constexpr = KP if KP < COLUMNS else COLUMNS
    EACH: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    nbytes: tl.constexpr = AHEAD // 2 * EACH // 16 * 16
    half = nbytes // EACH * (threads // R)
    prefetch(
        weight + row.to(tl.int64) * K + item % SPLITS * KP + half,
        tl.full([_THREADS], nbytes, tl.int32),
        True,
    )


@triton.jit
def skinny_item(
    item,  # a tile's split
    weight,
    scales,
    bias,
    x,
    squares,
    out,
    next_norm,
    next_scaled,
    next_squares,
    partial,
    counters,
    batch,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    NEXT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A program's share of a product; the arguments are those of `skinny_kernel`."""
    R: tl.constexpr = 64
    MAX_BATCH: tl.constexpr = 64
    KP: tl.constexpr = K // SPLITS
    tile = item // SPLITS
    split = item % SPLITS
    lanes = tl.arange(0, R)
    inside = weight_row(tile, lanes, N, KIND)
    columns = tl.arange(0, BK)
    batch_rows = tl.arange(0, BP)
    alive = batch_rows < batch
    # What the end needs is asked for before the loop, and looked at after it: a load that is waited
    # for takes a microsecond (1.1 to 1.7 % of a step at batch 8, H100).
    factor = tl.zeros([BP], tl.float32)
    if NORM:
        parts = load_squares(squares, batch_rows, alive, PARTS, MAX_BATCH)
    residual = tl.zeros([R, BP], tl.float32)
    if KIND == _ADD:
        kept = (tile * R + lanes < N)[:, None] & alive[None, :]
        cells = batch_rows[None, :] * N + tile * R + lanes[:, None]
        residual = tl.load(out + cells, mask=kept, other=0.0).to(tl.float32)
    row_starts = inside.to(tl.int64) * K + split * KP
    pointers = weight + row_starts[:, None] + columns[None, :]
    x_pointers = x + batch_rows[None, :] * K + split * KP + columns[:, None]
    acc = tl.zeros([R, BP], tl.float32)
    for k in tl.range(0, KP, BK, num_stages=STAGES):
        if KP % BK == 0:
            weights = tl.load(pointers + k, eviction_policy="evict_first")
            values = tl.load(x_pointers + k, mask=alive[None, :], other=0.0)
        else:
            there = columns < KP - k
            weights = tl.load(pointers + k, mask=there[None, :], other=0.0)
            values = tl.load(x_pointers + k, mask=there[:, None] & alive[None, :], other=0.0)
        acc = dot(widened(weights, values.dtype), values, acc)
    if NORM:
        factor = tl.rsqrt(tl.sum(parts, 0) / K + eps)
    if SPLITS > 1:
        cells = lanes[:, None] * BP + batch_rows[None, :]
        tl.store(partial + (tile * SPLITS + split) * (R * BP) + cells, acc)
        if arrive(counters + tile, SPLITS):
            acc = tl.zeros([R, BP], tl.float32)
            for other in tl.static_range(SPLITS):
                start = partial + (tile * SPLITS + other) * (R * BP)
                acc += tl.load(start + cells, cache_modifier=".cg")
            _finish(
                acc,
                factor,
                residual,
                inside,
                tile,
                scales,
                bias,
                out,
                next_norm,
                next_scaled,
                next_squares,
                batch,
                N,
                BP,
                KIND,
                NORM,
                NEXT,
                SCALED,
                BIAS,
            )
    else:
        _finish(
            acc,
            factor,
            residual,
            inside,
            tile,
            scales,
            bias,
            out,
            next_norm,
            next_scaled,
            next_squares,
            batch,
            N,
            BP,
            KIND,
            NORM,
            NEXT,
            SCALED,
            BIAS,
        )


@triton.jit
def _finish(
    acc,  # [R, BP], the sum over all of K
    factor,  # [BP], of the norm
    residual,  # [R, BP], what ADD adds to
    inside,  # [R], rows of the weight
    tile,
    scales,
    bias,
    out,
    next_norm,
    next_scaled,
    next_squares,
    batch,
    N: tl.constexpr,
    BP: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    NEXT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """What becomes of a finished tile."""
    R: tl.constexpr = 64
    MAX_BATCH: tl.constexpr = 64
    batch_rows = tl.arange(0, BP)
    alive = batch_rows < batch
    if SCALED:
        acc *= tl.load(scales + inside)[:, None]
    if NORM:
        acc *= factor[None, :]
    if BIAS:
        acc += tl.load(bias + inside).to(tl.float32)[:, None]
    if KIND == _GATE_UP:
        pairs = tl.permute(tl.reshape(acc, [2, R // 2, BP]), [1, 2, 0])
        gate, up = tl.split(pairs)
        rows = tile * (R // 2) + tl.arange(0, R // 2)
        result = gate * tl.sigmoid(gate) * up
    else:
        rows = tile * R + tl.arange(0, R)
        result = acc
    kept = (rows < N)[:, None] & alive[None, :]
    cells = batch_rows[None, :] * N + rows[:, None]
    if KIND == _ADD:
        result += residual
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=kept)
    if NEXT:
        wide = tl.where(kept, result, 0.0)
        tl.store(next_squares + tile * MAX_BATCH + batch_rows, tl.sum(wide * wide, 0))
        norm = tl.load(next_norm + inside).to(tl.float32)
        made = (wide * norm[:, None]).to(next_scaled.dtype.element_ty)
        tl.store(next_scaled + cells, made, mask=kept)
