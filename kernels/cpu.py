"""The CPU path of torch's own operations: bfloat16, and where the native kernels cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Geometry, Linear, Segment, StepInputs, attention_cpu
from agentrt.kernels.attention_cpu import CpuPlan
from agentrt.kernels.linear_cpu import Int8Linear
from agentrt.kernels.plain import PlainStep, plain_rotation
from agentrt.kernels.reference import DenseLinear

LinearKind = Literal["dense", "int8"]
_PACK: dict[LinearKind, Callable[[Tensor, Tensor | None], Linear]] = {
    "dense": DenseLinear,
    "int8": Int8Linear.pack,
}


@frozen
class CpuOps:
    """See `agentrt.kernels.Ops` and `agentrt.kernels.plain.PlainOps`."""

    linear_kind: LinearKind

    @property
    def name(self) -> str:
        return f"cpu-{self.linear_kind}"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        pack = _PACK[self.linear_kind]
        return pack(weight, bias)

    def pack_rotation(self, angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return plain_rotation(angles, like)

    def plan_step(self, inputs: StepInputs, geometry: Geometry) -> PlainStep:
        return PlainStep.plan(self, inputs, geometry)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        turned = torch.roll(x, x.shape[-1] // 2, -1).mul_(sin)
        x.mul_(cos).add_(turned)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def plan_attention(self, segments: tuple[Segment, ...], kv: Tensor, num_heads: int) -> CpuPlan:
        return attention_cpu.plan_attention(segments, kv)
