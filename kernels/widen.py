"""Weights of 8 bits (e4m3), made as wide as what they are multiplied by.

The way leads over float32: to bf16 at once, the compiler takes one number at a time through the
unit of special functions, an eighth of the rate. Either way is exact, with numbers below the normal
ones too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 2048
TILE_VALUES = 8192  # 32 a thread
_THREAD_COLUMNS = tl.constexpr(8)  # that a thread stores at once


@triton.jit
def widened(weights, dtype: tl.constexpr):
    """A tile of weights in `dtype`."""
    if weights.dtype.primitive_bitwidth == 8:
        return weights.to(tl.float32).to(dtype)
    return weights.to(dtype)


@triton.jit
def widen_kernel(
    weight,  # [N, K], fp8
    scales,  # [N]
    out,  # [N, K]
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
):
    # Column by column the programs go through a weight as it lies in memory.
    PARTS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    rows = program // PARTS * R + tl.arange(0, R)
    # A thread loads no more than it stores: else the tile would change hands in shared memory.
    columns = program % PARTS * BK + tl.max_contiguous(tl.arange(0, BK), _THREAD_COLUMNS)
    there = (rows < N)[:, None] & (columns < K)[None, :]
    cells = rows.to(tl.int64)[:, None] * K + columns[None, :]
    values = tl.load(weight + cells, mask=there, other=0.0, eviction_policy="evict_first")
    scale = tl.load(scales + rows, mask=rows < N, other=0.0).to(out.dtype.element_ty)
    result = values.to(tl.float32) * scale.to(tl.float32)[:, None]
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=there)


def widen(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] times its rows' scales, both of them first rounded to `dtype`."""
    num_rows, num_columns = weight.shape
    assert weight.is_contiguous()
    columns = min(TILE_COLUMNS, triton.next_power_of_2(num_columns))
    rows = TILE_VALUES // columns
    out = torch.empty_like(weight, dtype=dtype)
    programs = triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns)
    widen_kernel[(programs,)](
        weight, scales, out, num_rows, num_columns, rows, columns, num_warps=8
    )
    return out
