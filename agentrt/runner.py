"""The device side of an engine: the model, the KV memory, one forward at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import define, field, frozen
from torch import Tensor

from agentrt.batch import build_batch
from agentrt.cache import Copy
from agentrt.config import ResolvedConfig
from agentrt.errors import ConfigError
from agentrt.grammar_masks import Filling, MaskThread
from agentrt.kernels.dispatch import Compute, has_fast_int8
from agentrt.kernels.host_memory import host_memory
from agentrt.models.base import Model, ModelSpec
from agentrt.sampler import Sampled, sample
from agentrt.scheduler import Plan, Work
from agentrt.speculate import CPU_LIMITS, SLOW_CPU_LIMITS, DraftLimits
from agentrt.transfer import Copier, HostCopier


class Ticket(Protocol):
    """A step that was launched."""

    @property
    def sampling(self) -> tuple[Work, ...]:
        """The work that gives a token each."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the next step may be launched before this one's tokens are known: the device
        samples them, and a later launch finds them there, where a request has PENDING."""


class Runner(Protocol):
    """What the step thread needs of a device (tests put a fake one here)."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Make copies inside the KV pool, before anything else reads or writes it."""

    def launch(self, plan: Plan) -> Any:
        """Begin to compute a plan, or compute it. Returns a Ticket of the runner's own kind."""

    def collect(self, ticket: Any) -> Sequence[Sequence[Sampled]]:
        """Wait for a step, and give each work's tokens, in the order of the ticket's sampling: one,
        and one more for each token of its draft that was right."""

    @property
    def draft_limits(self) -> DraftLimits | None:
        """Which drafts pay; None where a work must have none."""

    def copier(self) -> Copier:
        """What moves KV between the pool and the tiers below it."""

    def close(self) -> None:
        """Give the memory back."""


@frozen
class Computed:
    """The ticket of a step that is done: logits [output rows, vocab], float32."""

    sampling: tuple[Work, ...]
    logits: Tensor
    runs_ahead: bool = False
    filling: Filling | None = None  # the masks of its grammars


def collect_computed(ticket: Computed) -> list[list[Sampled]]:
    """Sample on the host's side."""
    if not ticket.sampling:
        return []
    requests = [work.request for work in ticket.sampling]
    masks = None if ticket.filling is None else ticket.filling.masks()
    return sample(ticket.logits, requests, [work.num_draft for work in ticket.sampling], masks)


def begin_masks(masks: MaskThread, sampling: Sequence[Work]) -> Filling | None:
    """Ask for the masks of all rows that a step will give."""
    if all(work.request.constraint is None for work in sampling):
        return None
    asked = []
    for work in sampling:
        request = work.request
        draft = request.tokens[request.num_tokens : request.num_tokens + work.num_draft]
        asked.append((request.constraint, draft.tolist()))
    return masks.begin(asked)


@define
class ModelRunner:
    """Owns the KV pool [layers, 2, blocks, kv_heads, block_tokens, dim]. Only the step thread calls
    `launch`. Memory is zeroed: masked keys of unwritten slots are multiplied by 0, so they must be
    finite.
    """

    model: Model
    compute: Compute
    config: ResolvedConfig
    masks: MaskThread = field(factory=MaskThread)
    kv: Tensor = field(init=False)

    @kv.default
    def _pool(self) -> Tensor:
        return kv_pool(self.model.spec, self.config, self.compute)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Computed:
        batch = build_batch(plan, self.compute.device)
        filling = begin_masks(self.masks, batch.sampling)
        logits = self.model.forward(
            batch.token_ids, batch.positions, batch.segments, self.kv, batch.output_rows
        )
        return Computed(batch.sampling, logits, filling=filling)

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        copy_blocks(self.kv, copies, self.compute.kv_layout.group_tokens)

    def collect(self, ticket: Computed) -> list[list[Sampled]]:
        return collect_computed(ticket)

    def copier(self) -> Copier:
        return HostCopier(self.kv.view(torch.uint8).numpy(), self.compute.kv_layout)

    @property
    def draft_limits(self) -> DraftLimits | None:
        return CPU_LIMITS if has_fast_int8() else SLOW_CPU_LIMITS

    def close(self) -> None:
        self.masks.close()
        self.kv = torch.empty(0)
        del self.model


def kv_pool(spec: ModelSpec, config: ResolvedConfig, compute: Compute) -> Tensor:
    """Zeroed memory [layers, 2, blocks, kv_heads, block_tokens, dim]."""
    shape = (
        spec.num_layers,
        2,
        config.num_blocks,
        spec.num_kv_heads,
        config.block_tokens,
        spec.head_dim,
    )
    group = compute.kv_layout.group_tokens
    if config.block_tokens % group:
        raise ConfigError(
            f"block_tokens={config.block_tokens}: {compute.ops.name} needs a multiple of {group}"
        )
    if compute.device.type != "cpu":
        return torch.zeros(shape, dtype=compute.dtype, device=compute.device)
    return host_memory(math.prod(shape) * compute.dtype.itemsize).view(compute.dtype).view(shape)


def copy_blocks(kv: Tensor, copies: Sequence[Copy], group_tokens: int = 1) -> None:
    """Make the block copies that a plan asks for, in whole groups of tokens (see `kv_layout`):
    what is copied beyond a copy's last token is not yet written, and never read."""
    for copy in copies:
        num = -(-copy.num_tokens // group_tokens) * group_tokens
        kv[:, :, copy.target, :, :num] = kv[:, :, copy.source, :, :num]
