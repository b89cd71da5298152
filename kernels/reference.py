"""Every operation in plain torch, written to be read: the oracle of the tests, and the path of
devices without kernels of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Geometry, Segment, StepInputs
from agentrt.kernels.plain import PlainStep, plain_rotation


@frozen
class ReferencePlan:
    """See `agentrt.kernels.plain.AttentionPlan`."""

    segments: tuple[Segment, ...]
    kv: Tensor
    blocks: Tensor  # [rows] block of each row
    offsets: Tensor  # [rows] place within the block

    def append_kv(self, layer: int, key_value: Tensor) -> None:
        for cache, new in zip(self.kv[layer], key_value.unbind(1), strict=True):
            cache[self.blocks, :, self.offsets] = new

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        for segment in self.segments:
            rows = slice(segment.first_row, segment.first_row + segment.num_rows)
            out[rows] = attend_segment(query[rows], self.kv[layer], segment)
        return out


def row_slots(segments: tuple[Segment, ...], block_tokens: int) -> Iterator[tuple[int, int]]:
    """(block, offset) of each row, in row order."""
    for segment in segments:
        for position in range(segment.start_position, segment.start_position + segment.num_rows):
            yield segment.block_ids[position // block_tokens], position % block_tokens


@frozen
class DenseLinear:
    """A plain matrix product in the weight's dtype."""

    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@frozen
class ReferenceOps:
    """See `agentrt.kernels.Ops` and `agentrt.kernels.plain.PlainOps`."""

    device: torch.device
    name: str = "torch-reference"

    def pack_rotation(self, angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return plain_rotation(angles, like)

    def plan_step(self, inputs: StepInputs, geometry: Geometry) -> PlainStep:
        return PlainStep.plan(self, inputs, geometry)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        return DenseLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normal.to(x.dtype)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = x.shape[-1] // 2
        x.copy_(x * cos + torch.roll(x, half, -1) * sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def plan_attention(
        self, segments: tuple[Segment, ...], kv: Tensor, num_heads: int
    ) -> ReferencePlan:
        slots = torch.tensor(list(row_slots(segments, kv.shape[4])), device=self.device)
        return ReferencePlan(segments, kv, slots[:, 0], slots[:, 1])


def attend_segment(query: Tensor, kv: Tensor, segment: Segment) -> Tensor:
    """query [rows, heads, dim] of one segment over kv [2, blocks, kv_heads, block_tokens, dim]."""
    end = segment.start_position + segment.num_rows
    blocks = torch.tensor(segment.block_ids, device=query.device)
    context = kv[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :end]  # [2, kv_heads, tokens, dim]
    groups = query.shape[1] // context.shape[1]
    key, value = context.repeat_interleave(groups, dim=1).float()
    scores = query.transpose(0, 1).float() @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    positions = torch.arange(segment.start_position, end, device=query.device)
    hidden = torch.arange(end, device=query.device)[None, :] > positions[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out: Tensor = weights @ value
    return out.transpose(0, 1).to(query.dtype)
