"""One row times a weight matrix, at the memory's speed: the products of decoding at batch 1.

A program takes some rows of the weight whole. Its first tile of weights is in registers before it
waits for the kernel before (see `dependent`), each further one while the last is multiplied. The
norm of the input is folded in: every program has the whole row anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.dependent import start_next, wait_previous

# What becomes of the product.
STORE = 0  # written as it is, in the output's dtype
ADD = 1  # added to the output
GATE_UP = 2  # silu(first half) * second half

_STORE = tl.constexpr(STORE)
_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)


@triton.jit
def load_weights(pointers, there, EVEN: tl.constexpr):
    """A tile of weights, [R, BK]; columns that are not there are zero."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=there[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vector(pointers, there, EVEN: tl.constexpr):
    """As many numbers of a row as a tile has columns, in float32."""
    if EVEN:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=there, other=0.0).to(tl.float32)


@triton.jit
def finish_rows(
    rows,  # [R]
    acc,  # [R, BK]
    up,  # [R, BK], of GATE_UP
    squares,  # [BK], of the input, if NORM
    before,  # [R], what ADD adds to
    scales,
    bias,
    out,
    copy,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """From the sums of each column of a tile to the rows' output."""
    inside = tl.minimum(rows, N - 1)
    total = tl.sum(acc, 1)
    if KIND == _GATE_UP:
        up_total = tl.sum(up, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        total *= factor
        if KIND == _GATE_UP:
            up_total *= factor
    if SCALED:
        total *= tl.load(scales + inside)
        if KIND == _GATE_UP:
            up_total *= tl.load(scales + N + inside)
    if BIAS:
        total += tl.load(bias + inside).to(tl.float32)
    if KIND == _GATE_UP:
        result = total * tl.sigmoid(total) * up_total
    elif KIND == _ADD:
        result = before + total
    else:
        result = total
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < N)
    if COPY:
        tl.store(copy + rows, result.to(copy.dtype.element_ty), mask=rows < N)


@triton.jit
def gemv_stage(
    program,
    weight,  # [N, K], or [2 * N, K] with GATE_UP
    scales,  # [N], of fp8 weights; of GATE_UP [2 * N]
    bias,  # [N]
    norm,  # [K]
    x,  # [K]
    out,  # [N]
    copy,  # [N], if COPY: the output, in bf16
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    EVEN: tl.constexpr = K % BK == 0
    start_next(PDL)
    rows = program * R + tl.arange(0, R)
    columns = tl.arange(0, BK)
    inside = tl.minimum(rows, N - 1)  # rows beyond the end repeat the last, and are not stored
    pointers = weight + inside[:, None].to(tl.int64) * K + columns[None, :]
    up_pointers = pointers + tl.cast(N, tl.int64) * K
    there = columns < K
    tile = load_weights(pointers, there, EVEN)
    if KIND == _GATE_UP:
        up_tile = load_weights(up_pointers, there, EVEN)
    if NORM:
        scale = load_vector(norm + columns, there, EVEN)
    wait_previous(PDL)
    if KIND == _ADD:  # before the sum is there, not after it: half a microsecond of latency
        before = tl.load(out + inside).to(tl.float32)
    values = load_vector(x + columns, there, EVEN)
    if NORM:
        squares = values * values
        values *= scale
    acc = tile.to(tl.float32) * values[None, :]
    if KIND == _GATE_UP:
        up = up_tile.to(tl.float32) * values[None, :]
    for k in range(BK, K, BK):
        there = columns < K - k
        tile = load_weights(pointers + k, there, EVEN)
        if KIND == _GATE_UP:
            up_tile = load_weights(up_pointers + k, there, EVEN)
        values = load_vector(x + k + columns, there, EVEN)
        if NORM:
            squares += values * values
            values *= load_vector(norm + k + columns, there, EVEN)
        acc += tile.to(tl.float32) * values[None, :]
        if KIND == _GATE_UP:
            up += up_tile.to(tl.float32) * values[None, :]
    finish_rows(
        rows,
        acc,
        up if KIND == _GATE_UP else acc,
        squares if NORM else values,
        before if KIND == _ADD else eps,
        scales,
        bias,
        out,
        copy,
        eps,
        N,
        K,
        KIND,
        NORM,
        COPY,
        SCALED,
        BIAS,
    )


@triton.jit
def gemv_kernel(
    weight,
    scales,
    bias,
    norm,
    x,
    out,
    copy,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    gemv_stage(
        tl.program_id(0),
        weight,
        scales,
        bias,
        norm,
        x,
        out,
        copy,
        eps,
        N,
        K,
        R,
        BK,
        KIND,
        NORM,
        COPY,
        SCALED,
        BIAS,
        PDL,
    )


@frozen
class GemvTiles:
    """How the work is cut: rows and columns of a tile, warps of a program."""

    rows: int
    columns: int
    num_warps: int

    @classmethod
    def choose(cls, num_rows: int, num_columns: int, kind: int) -> GemvTiles:
        """What was best on an H100 within whole steps of 1B and 8B shapes."""
        if kind == ADD:
            rows, columns, num_warps = (8, 2048, 8) if num_columns >= 4096 else (4, 2048, 4)
        elif num_columns >= 4096:
            is_wide = kind == GATE_UP or num_rows >= 65536
            rows, columns, num_warps = (2, 4096, 8) if is_wide else (4, 2048, 8)
        elif kind == GATE_UP:
            rows, columns, num_warps = 2, 1024, 4
        else:
            rows, columns, num_warps = (4, 1024, 4) if num_rows >= 65536 else (8, 1024, 8)
        while num_columns % columns and columns > 512:
            columns, rows = columns // 2, rows * 2
        return cls(rows, min(columns, triton.next_power_of_2(num_columns)), num_warps)


def gemv(
    weight: Tensor,
    x: Tensor,  # [1, K]
    out: Tensor,  # [1, N]
    *,
    kind: int = STORE,
    norm: Tensor | None = None,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    copy: Tensor | None = None,
    eps: float = 0.0,
    tiles: GemvTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """out = x W^T (+ bias), or what `kind` says; with `norm`, of the normed x. `copy` gets the
    output too, in its own dtype."""
    num_rows, num_columns = out.shape[-1], x.shape[-1]
    tiles = tiles or GemvTiles.choose(num_rows, num_columns, kind)
    gemv_kernel[(triton.cdiv(num_rows, tiles.rows),)](
        weight,
        weight if scales is None else scales,
        weight if bias is None else bias,
        weight if norm is None else norm,
        x,
        out,
        out if copy is None else copy,
        eps,
        num_rows,
        num_columns,
        tiles.rows,
        tiles.columns,
        kind,
        norm is not None,
        copy is not None,
        scales is not None,
        bias is not None,
        pdl,
        num_warps=tiles.num_warps,
        **launch_options(pdl),
    )
    return out


def launch_options(pdl: bool) -> dict[str, bool]:
    """Options of a launch that not every target knows."""
    return {"launch_pdl": True} if pdl else {}
