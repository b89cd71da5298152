"""Row-wise Triton kernels: embedding look-up, norm, gate; one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels.dependent import start_next, wait_previous
from agentrt.kernels.exact import exact_options
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.skinny import MAX_ROWS, Normed


@triton.jit
def fetch_kernel(
    ring,  # [BUFFERS, SIZE], in the host's memory
    step,  # [1], how often this was done before
    out,  # [SIZE]
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    BUFFERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first kernel of a decode step: its inputs, from where the host has put them."""
    start_next(PDL)
    place = tl.load(step) % BUFFERS
    index = tl.arange(0, NP)
    there = index < SIZE
    values = tl.load(ring + place * SIZE + index, mask=there, other=0, cache_modifier=".cv")
    tl.store(out + index, values, mask=there)


def fetch(ring: Tensor, step: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """Copy the buffer of `ring` whose turn it is; `sample_rows` counts `step` up."""
    buffers, size = ring.shape
    fetch_kernel[(1,)](
        ring,
        step,
        out,
        size,
        triton.next_power_of_2(size),
        buffers,
        pdl,
        num_warps=8,
    )


@triton.jit
def embed_row(
    row,
    token_ids,
    slots,
    last_tokens,
    table,
    norm,
    out,
    scaled,
    squares,
    N: tl.constexpr,
    NP: tl.constexpr,
    NORM: tl.constexpr,
):
    """A row of the embedding; the arguments are those of `embed_kernel`."""
    token = tl.load(token_ids + row).to(tl.int64)
    if token < 0:
        token = tl.load(last_tokens + tl.load(slots + row)).to(tl.int64)
    columns = tl.arange(0, NP)
    there = columns < N
    wide = tl.load(table + token * N + columns, mask=there, other=0.0).to(tl.float32)
    start = tl.cast(row, tl.int64) * N
    tl.store(out + start + columns, wide, mask=there)
    if NORM:
        weight = tl.load(norm + columns, mask=there, other=0.0).to(tl.float32)
        made = (wide * weight).to(scaled.dtype.element_ty)
        tl.store(scaled + start + columns, made, mask=there)
        tl.store(squares + row, tl.sum(wide * wide, 0))


@triton.jit
def embed_kernel(
    token_ids,  # [rows]; a negative one stands for the slot's last sampled token
    slots,  # [rows]
    last_tokens,  # [slots]
    table,  # [vocab, N]
    norm,  # [N], if NORM
    out,  # [rows, N], float32
    scaled,  # [rows, N]: out times the norm's weight
    squares,  # [MAX_BATCH]
    N: tl.constexpr,
    NP: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """It never lets the next kernel start early: that may read the step's inputs before it waits
    (see `dependent`)."""
    wait_previous(PDL)
    embed_row(
        tl.program_id(0),
        token_ids,
        slots,
        last_tokens,
        table,
        norm,
        out,
        scaled,
        squares,
        N,
        NP,
        NORM,
    )


def embed(
    token_ids: Tensor,
    slots: Tensor,
    last_tokens: Tensor,
    table: Tensor,
    out: Tensor,
    following: tuple[Tensor, Normed] | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Rows of the embedding; with `following`, also what the first norm's reader needs."""
    rows, width = out.shape
    embed_kernel[(rows,)](
        token_ids,
        slots,
        last_tokens,
        table,
        table if following is None else following[0],
        out,
        out if following is None else following[1].values,
        out if following is None else following[1].squares,
        width,
        triton.next_power_of_2(width),
        following is not None,
        pdl,
        num_warps=8,
        **launch_options(pdl),
    )
    if following is not None:
        assert following[1].squares.shape == (1, MAX_ROWS)
    return out


@triton.jit
def add_norm_kernel(
    hidden,  # [rows, N], float32
    change,  # [rows, N], added to hidden first, if ADD
    norm,  # [N]
    out,  # [rows, N]
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    start = tl.program_id(0).to(tl.int64) * N
    columns = tl.arange(0, NP)
    there = columns < N
    values = tl.load(hidden + start + columns, mask=there, other=0.0)
    if ADD:
        values += tl.load(change + start + columns, mask=there, other=0.0).to(tl.float32)
        tl.store(hidden + start + columns, values, mask=there)
    factor = tl.rsqrt(tl.sum(values * values, 0) / N + eps)
    weight = tl.load(norm + columns, mask=there, other=0.0).to(tl.float32)
    result = values * factor * weight
    tl.store(out + start + columns, result.to(out.dtype.element_ty), mask=there)


def add_norm(
    hidden: Tensor,
    change: Tensor | None,
    norm: Tensor,
    eps: float,
    *,
    is_exact: bool = False,
    pdl: bool = False,
) -> Tensor:
    """hidden += change, in place, and its root-mean-square norm in the norm's dtype. `is_exact`:
    see `exact`."""
    rows, width = hidden.shape
    out = norm.new_empty(rows, width)
    add_norm_kernel[(rows,)](
        hidden,
        hidden if change is None else change,
        norm,
        out,
        eps,
        width,
        triton.next_power_of_2(width),
        change is not None,
        pdl,
        num_warps=8,
        **exact_options(pdl, is_exact),
    )
    return out


@triton.jit
def silu_mul_kernel(gate_up, out, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < N
    gate = tl.load(gate_up + row * (2 * N) + columns, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * N) + N + columns, mask=there, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * N + columns, result.to(out.dtype.element_ty), mask=there)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [rows, 2 * width] tensor."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(4096, triton.next_power_of_2(width))
    silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, block, num_warps=8)
    return out
