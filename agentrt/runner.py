"""The device side of an engine: the model, the KV memory, one forward at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from agentrt.batch import Batch, build_batch
from agentrt.cache import Copy
from agentrt.config import ResolvedConfig
from agentrt.kernels.dispatch import Compute
from agentrt.models.base import Model
from agentrt.scheduler import Plan
from agentrt.transfer import Copier, HostCopier


class Runner(Protocol):
    """What the step thread needs of a device (tests put a fake one here)."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Make copies inside the KV pool, before anything else reads or writes it."""

    def run(self, plan: Plan) -> tuple[Batch, Tensor]:
        """Compute a plan. Returns the batch and float32 logits [samples, vocab]."""

    def copier(self) -> Copier:
        """What moves KV between the pool and the tiers below it."""

    def close(self) -> None:
        """Give the memory back."""


@define
class ModelRunner:
    """Owns the KV pool [layers, 2, blocks, kv_heads, block_tokens, dim]. Only the step thread calls
    `run`. Memory is zeroed: masked keys of unwritten slots are multiplied by 0, so must be finite.
    """

    model: Model
    compute: Compute
    config: ResolvedConfig
    kv: Tensor = field(init=False)

    @kv.default
    def _pool(self) -> Tensor:
        spec, config = self.model.spec, self.config
        shape = (
            spec.num_layers,
            2,
            config.num_blocks,
            spec.num_kv_heads,
            config.block_tokens,
            spec.head_dim,
        )
        dtype, device = self.compute.dtype, self.compute.device
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # calloc: the system hands out zeroed pages when they are first written
        pool = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(pool).view(dtype).view(shape)

    @torch.inference_mode()
    def run(self, plan: Plan) -> tuple[Batch, Tensor]:
        batch = build_batch(plan, self.compute.device)
        logits = self.model.forward(
            batch.token_ids, batch.positions, batch.segments, self.kv, batch.output_rows
        )
        return batch, logits

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self.kv[:, :, copy.target, :, : copy.num_tokens] = self.kv[
                :, :, copy.source, :, : copy.num_tokens
            ]

    def copier(self) -> Copier:
        return HostCopier(self.kv.view(torch.uint8).numpy())

    def close(self) -> None:
        self.kv = torch.empty(0)
        del self.model
