"""What a model asks of a device: one typed signature each.

`dispatch.choose_compute` picks an implementation once, when an engine starts: `reference` (plain
torch, any device, the oracle of the tests), `cpu` (the fast CPU path) or `cuda` (Triton).
Models call these and never look at the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

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


@frozen
class Geometry:
    """What all attention layers of a model have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    cos: Tensor  # as `Ops.pack_rotation` made them
    sin: Tensor
    hidden_size: int


@frozen
class StepInputs:
    """The rows of one forward: tokens of the whole batch, flattened."""

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    segments: tuple[Segment, ...]  # shorter ones first
    kv: Tensor  # [layers, 2, blocks, kv_heads, block_tokens, dim]: the pool of keys and values
    output_rows: Tensor  # [outputs]: the rows whose logits are wanted


class Linear(Protocol):
    """A weight matrix [out, in] that was packed for one device, with its bias if it has one."""


# Rows after a norm, in the form in which a step's products read them: only a step looks inside.
Normal = Any


class Step(Protocol):
    """One forward. A device may fuse whatever stands in one method."""

    def embed(self, table: Tensor, norm: Tensor) -> tuple[Tensor, Normal]:
        """The rows' embeddings [rows, hidden], and their norm."""

    def linear(self, x: Normal, linear: Linear) -> Tensor:
        """x W^T (+ bias), [rows, out]."""

    def attend(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        """Norm (if `norms`) and rotate queries and keys of qkv [rows, (heads + 2 * kv_heads) *
        dim], append keys and values to the pool, and let each row attend to its own context.
        Returns [rows, heads * dim]; qkv may be overwritten."""

    def attend_outputs(
        self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, hidden: Tensor
    ) -> tuple[Step, Tensor, Tensor] | None:
        """The same in the last layer, behind which only the output rows are read: the step that
        goes on with them alone, their part of `hidden`, and what they attended to. None if there
        are no such rows: keys and values were appended all the same."""

    def add_norm(self, hidden: Tensor, x: Tensor, linear: Linear, norm: Tensor) -> Normal:
        """hidden += x W^T, in place, and its norm."""

    def gate_up(self, x: Normal, linear: Linear) -> Tensor:
        """silu(gate) * up, where the matrix holds gate's rows and then up's (Shazeer 2020)."""

    def logits(self, x: Normal, linear: Linear) -> Tensor:
        """The rows' logits [rows, vocab], float32."""


class Ops(Protocol):
    """One device's way to compute."""

    @property
    def name(self) -> str:
        """What `Engine.stats()` calls it."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare a [out, in] matrix; the argument may be freed after."""

    def pack_rotation(self, angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of angles [context, dim / 2] (rotary embedding, half-split form, Su et
        al. 2021), on the device and, if need be, in the dtype of `like`."""

    def plan_step(self, inputs: StepInputs, geometry: Geometry) -> Step:
        """Prepare one forward."""
