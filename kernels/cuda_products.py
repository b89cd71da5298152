"""The ways in which a CUDA step multiplies, and the row-wise work around the products.

- `GemvProducts`: one row, weights streamed once at the memory's speed, norms folded in;
- `SkinnyProducts`: up to 64 rows, the same with tensor cores;
- `DenseProducts`: more rows, cuBLAS, and norms and gates as kernels of their own;
- `OrderedProducts`: any number of rows, with the same bits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Normal
from agentrt.kernels.gemv import ADD, GATE_UP, gemv
from agentrt.kernels.ordered_products import OrderedWork, ordered_product
from agentrt.kernels.rows import add_norm, embed, silu_mul
from agentrt.kernels.skinny import MAX_ROWS, Normed, SkinnyWork, num_tiles, skinny
from agentrt.kernels.widen import widen

WIDE_COLUMNS = 4096


@frozen
class CudaLinear:
    """A weight as it is read: bf16, or fp8 with one scale a row."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    scales: Tensor | None = None  # [out], float32


@frozen(kw_only=True)
class Rows:
    """The rows of a step on the device, int32."""

    token_ids: Tensor  # [rows]; negative: the slot's last sampled token
    slots: Tensor  # [rows], into `tables`
    positions: Tensor  # [rows]
    tables: Tensor  # [slots, blocks of the longest context]
    last_tokens: Tensor  # [slots]


class Products(Protocol):
    """The part of a `Step` that is not attention."""

    def embed(self, rows: Rows, table: Tensor, norm: Tensor) -> tuple[Tensor, Normal]: ...
    def linear(self, x: Normal, linear: CudaLinear) -> Tensor: ...
    def add_norm(self, hidden: Tensor, x: Tensor, linear: CudaLinear, norm: Tensor) -> Normal: ...
    def gate_up(self, x: Normal, linear: CudaLinear) -> Tensor: ...
    def logits(self, x: Normal, linear: CudaLinear) -> Tensor: ...


@frozen
class Unnormed:
    """A row and the norm that its reader has to apply."""

    values: Tensor
    norm: Tensor


@frozen
class GemvProducts:
    """See `agentrt.kernels.gemv`."""

    eps: float
    pdl: bool

    def embed(self, rows: Rows, table: Tensor, norm: Tensor) -> tuple[Tensor, Unnormed]:
        hidden = _embedded(rows, table, pdl=self.pdl)
        return hidden, Unnormed(hidden, norm)

    def linear(self, x: Unnormed, linear: CudaLinear) -> Tensor:
        return self._normed(x, linear, x.norm.new_empty(1, linear.weight.shape[0]))

    def add_norm(self, hidden: Tensor, x: Tensor, linear: CudaLinear, norm: Tensor) -> Unnormed:
        # The next products read a row of bf16: every program reads all of it, and float32 rows cost
        # 0.4 ms a step (8B shape).
        copy = norm.new_empty(1, hidden.shape[1])
        gemv(linear.weight, x, hidden, kind=ADD, scales=linear.scales, copy=copy, pdl=self.pdl)
        return Unnormed(copy, norm)

    def gate_up(self, x: Unnormed, linear: CudaLinear) -> Tensor:
        out = x.norm.new_empty(1, linear.weight.shape[0] // 2)
        return self._normed(x, linear, out, kind=GATE_UP)

    def logits(self, x: Unnormed, linear: CudaLinear) -> Tensor:
        out = x.norm.new_empty(1, linear.weight.shape[0], dtype=torch.float32)
        return self._normed(x, linear, out)

    def _normed(self, x: Unnormed, linear: CudaLinear, out: Tensor, kind: int = 0) -> Tensor:
        return gemv(
            linear.weight,
            x.values,
            out,
            kind=kind,
            norm=x.norm,
            bias=linear.bias,
            scales=linear.scales,
            eps=self.eps,
            pdl=self.pdl,
        )


@frozen
class SkinnyProducts:
    """See `agentrt.kernels.skinny`."""

    eps: float
    work: SkinnyWork
    pdl: bool

    def embed(self, rows: Rows, table: Tensor, norm: Tensor) -> tuple[Tensor, Normed]:
        following = self._following(rows.token_ids.shape[0], norm, 1)
        return _embedded(rows, table, (norm, following), pdl=self.pdl), following

    def linear(self, x: Normed, linear: CudaLinear) -> Tensor:
        out = x.values.new_empty(x.values.shape[0], linear.weight.shape[0])
        return self._skinny(x, linear, out)

    def add_norm(self, hidden: Tensor, x: Tensor, linear: CudaLinear, norm: Tensor) -> Normed:
        following = self._following(len(hidden), norm, num_tiles(hidden.shape[1], ADD))
        skinny(
            linear.weight,
            x,
            hidden,
            self.work,
            kind=ADD,
            scales=linear.scales,
            following=(norm, following),
            pdl=self.pdl,
        )
        return following

    def gate_up(self, x: Normed, linear: CudaLinear) -> Tensor:
        out = x.values.new_empty(x.values.shape[0], linear.weight.shape[0] // 2)
        return self._skinny(x, linear, out, kind=GATE_UP)

    def logits(self, x: Normed, linear: CudaLinear) -> Tensor:
        shape = x.values.shape[0], linear.weight.shape[0]
        return self._skinny(x, linear, x.values.new_empty(shape, dtype=torch.float32))

    def _following(self, num_rows: int, norm: Tensor, parts: int) -> Normed:
        squares = norm.new_empty(parts, MAX_ROWS, dtype=torch.float32)
        return Normed(norm.new_empty(num_rows, len(norm)), squares, self.eps)

    def _skinny(self, x: Normed, linear: CudaLinear, out: Tensor, kind: int = 0) -> Tensor:
        return skinny(
            linear.weight,
            x,
            out,
            self.work,
            kind=kind,
            scales=linear.scales,
            bias=linear.bias,
            pdl=self.pdl,
        )


@frozen
class DenseProducts:
    """Matrix products by cuBLAS, in whatever order of summation it picks for the shape.

    Wide rows are added to the residual stream in the product itself, which rounds nothing: 0.8 % of
    a prompt of 32,768 tokens (8B shape, H100). Narrow ones take longer that way (1B: 4 %).
    """

    eps: float

    def embed(self, rows: Rows, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        hidden = _embedded(rows, table)
        return hidden, add_norm(hidden, None, norm, self.eps)

    def linear(self, x: Tensor, linear: CudaLinear) -> Tensor:
        return torch.nn.functional.linear(x, _widened(linear, x.dtype), linear.bias)

    def add_norm(self, hidden: Tensor, x: Tensor, linear: CudaLinear, norm: Tensor) -> Tensor:
        if hidden.shape[1] < WIDE_COLUMNS:
            return add_norm(hidden, self.linear(x, linear), norm, self.eps)
        weight = _widened(linear, x.dtype).t()
        torch.addmm(hidden, x, weight, out_dtype=torch.float32, out=hidden)
        return add_norm(hidden, None, norm, self.eps)

    def gate_up(self, x: Tensor, linear: CudaLinear) -> Tensor:
        return silu_mul(self.linear(x, linear))

    def logits(self, x: Tensor, linear: CudaLinear) -> Tensor:
        return self.linear(x, linear).float()


@frozen
class OrderedProducts:
    """See `agentrt.kernels.ordered_products`."""

    eps: float
    work: OrderedWork
    pdl: bool

    def embed(self, rows: Rows, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        hidden = _embedded(rows, table, pdl=self.pdl)
        return hidden, self._norm(hidden, norm)

    def linear(self, x: Tensor, linear: CudaLinear) -> Tensor:
        return self._product(x, linear, x.new_empty(len(x), len(linear.weight)))

    def add_norm(self, hidden: Tensor, x: Tensor, linear: CudaLinear, norm: Tensor) -> Tensor:
        self._product(x, linear, hidden, kind=ADD)
        return self._norm(hidden, norm)

    def gate_up(self, x: Tensor, linear: CudaLinear) -> Tensor:
        out = x.new_empty(len(x), len(linear.weight) // 2)
        return self._product(x, linear, out, kind=GATE_UP)

    def logits(self, x: Tensor, linear: CudaLinear) -> Tensor:
        out = x.new_empty(len(x), len(linear.weight), dtype=torch.float32)
        return self._product(x, linear, out)

    def _norm(self, hidden: Tensor, norm: Tensor) -> Tensor:
        return add_norm(hidden, None, norm, self.eps, is_exact=True, pdl=self.pdl)

    def _product(self, x: Tensor, linear: CudaLinear, out: Tensor, kind: int = 0) -> Tensor:
        return ordered_product(
            linear.weight,
            x,
            out,
            self.work,
            kind=kind,
            scales=linear.scales,
            bias=linear.bias,
            pdl=self.pdl,
        )


def _embedded(
    rows: Rows,
    table: Tensor,
    following: tuple[Tensor, Normed] | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """The residual stream: in float32, as rounding it twice a layer is most of bf16's error."""
    shape = len(rows.token_ids), table.shape[1]
    hidden = table.new_empty(shape, dtype=torch.float32)
    return embed(rows.token_ids, rows.slots, rows.last_tokens, table, hidden, following, pdl=pdl)


def _widened(linear: CudaLinear, dtype: torch.dtype) -> Tensor:
    """The weight in the activations' dtype."""
    if linear.scales is None:
        return linear.weight
    return widen(linear.weight, linear.scales, dtype)
