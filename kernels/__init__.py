"""The operations that a model is made of: one typed signature each.

`dispatch.choose_ops` picks an implementation once, when an engine starts:
`reference` (plain torch, any device, the oracle of the tests) or `cpu` (the fast CPU path).
Models call these and never look at the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Segment:
    """Consecutive rows of a batch that belong to one request.

    Rows `first_row .. first_row + num_rows` hold the tokens at positions `start_position ...`;
    `block_ids[i]` is the KV block of positions `[i * block_tokens, (i + 1) * block_tokens)`.
    """

    first_row: int
    num_rows: int
    start_position: int
    block_ids: tuple[int, ...]


class AttentionPlan(Protocol):
    """The attention of one step: all that does not depend on the layer's values is done."""

    def append_kv(self, layer: int, key_value: Tensor) -> None:
        """Write the rows' own key_value [rows, 2, kv_heads, dim] into the pool."""

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Causal attention of query [rows, heads, dim] over each row's own context, to which the
        rows' own keys and values were appended before. Returns [rows, heads, dim]."""


class Linear(Protocol):
    """A weight matrix that was packed for one device: y = x W^T (+ bias)."""

    def __call__(self, x: Tensor) -> Tensor:  # [rows, in] -> [rows, out]
        ...


class Ops(Protocol):
    """Every operation on the device. Rows are tokens of the whole batch, flattened."""

    @property
    def name(self) -> str:
        """What `Engine.stats()` calls it."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare a [out, in] matrix for `Linear.__call__`; the argument may be freed after."""

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
        """Prepare one step. kv [layers, 2, blocks, kv_heads, block_tokens, dim] is the pool of
        keys and values. Segments of one row must come first.
        """
