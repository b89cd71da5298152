"""A step made of separate operations: how devices compute that fuse nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Geometry, Linear, Segment, StepInputs

Product = Callable[[Tensor], Tensor]  # what plain `Linear`s are: [rows, in] -> [rows, out]


class AttentionPlan(Protocol):
    """The attention of one step: all that does not depend on the layer's values is done."""

    def append_kv(self, layer: int, key_value: Tensor) -> None:
        """Write the rows' own key_value [rows, 2, kv_heads, dim] into the pool."""

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Causal attention of query [rows, heads, dim] over each row's own context, to which the
        rows' own keys and values were appended before. Returns [rows, heads, dim]."""


class PlainOps(Protocol):
    """The operations. Rows are tokens of the whole batch, flattened."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, in float32 (Zhang, Sennrich 2019)."""

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary embedding in place, half-split form: x [rows, heads, dim]; cos, sin
        [rows, 1, dim], where the first half of sin carries the minus sign (Su et al. 2021)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of a [rows, 2 * width] tensor (Shazeer 2020)."""

    def plan_attention(
        self, segments: tuple[Segment, ...], kv: Tensor, num_heads: int
    ) -> AttentionPlan:
        """Prepare one step over the pool. Segments of one row must come first."""


@frozen
class PlainStep:
    """See `agentrt.kernels.Step`."""

    ops: PlainOps
    inputs: StepInputs
    geometry: Geometry
    attention: AttentionPlan
    cos: Tensor  # [rows, 1, dim]
    sin: Tensor

    @classmethod
    def plan(cls, ops: PlainOps, inputs: StepInputs, geometry: Geometry) -> PlainStep:
        attention = ops.plan_attention(inputs.segments, inputs.kv, geometry.num_heads)
        cos, sin = geometry.cos[inputs.positions], geometry.sin[inputs.positions]
        return cls(ops, inputs, geometry, attention, cos, sin)

    def embed(self, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        hidden = table[self.inputs.token_ids]
        return hidden, self.ops.rms_norm(hidden, norm, self.geometry.norm_eps)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        return cast(Product, linear)(x)

    def attend(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        query = self._append(layer, qkv, norms)
        return self.attention.attend(layer, query).flatten(1)

    def attend_outputs(
        self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, hidden: Tensor
    ) -> tuple[PlainStep, Tensor, Tensor] | None:
        query, outputs = self._append(layer, qkv, norms), self.inputs.output_rows
        if not len(outputs):
            return None
        attended = self.attention.attend(layer, query).flatten(1)
        return self, hidden[outputs], attended[outputs]

    def _append(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        """Write the rows' keys and values into the pool. Returns their queries, turned."""
        heads, kv_heads = self.geometry.num_heads, self.geometry.num_kv_heads
        all_heads = qkv.view(-1, heads + 2 * kv_heads, self.geometry.head_dim)
        query, key = all_heads[:, :heads], all_heads[:, heads : heads + kv_heads]
        if norms is not None:
            query.copy_(self.ops.rms_norm(query, norms[0], self.geometry.norm_eps))
            key.copy_(self.ops.rms_norm(key, norms[1], self.geometry.norm_eps))
        self.ops.rotate_(all_heads[:, : heads + kv_heads], self.cos, self.sin)
        key_value = all_heads[:, heads:].view(-1, 2, kv_heads, self.geometry.head_dim)
        self.attention.append_kv(layer, key_value)
        return query

    def add_norm(self, hidden: Tensor, x: Tensor, linear: Linear, norm: Tensor) -> Tensor:
        hidden += cast(Product, linear)(x)
        return self.ops.rms_norm(hidden, norm, self.geometry.norm_eps)

    def gate_up(self, x: Tensor, linear: Linear) -> Tensor:
        return self.ops.silu_mul(cast(Product, linear)(x))

    def logits(self, x: Tensor, linear: Linear) -> Tensor:
        return cast(Product, linear)(x).float()


def plain_rotation(angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin [context, 1, dim], as `PlainOps.rotate_` wants them."""
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    place: Any = {"device": like.device, "dtype": like.dtype}
    return cos[:, None].to(**place), sin[:, None].to(**place)
