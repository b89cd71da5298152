"""Counters of one engine, and the frozen snapshot that `Engine.stats()` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field, frozen

if TYPE_CHECKING:
    from agentrt.cache.tier import LowerStats
    from agentrt.types import TierName


@frozen(kw_only=True)
class Stats:
    """A snapshot. Counts are since the engine opened; seconds are of the engine's clock."""

    model: str
    kernels: str
    weights: str
    waiting: int
    running: int
    finished: int
    cancelled: int
    preempted: int
    steps: int
    prompt_tokens: int  # whose KV is there: the sum of the next three
    cached_tokens: int  # were on the device, some of them fetched ahead
    loaded_tokens: Mapping[TierName, int]  # came from lower tiers for the sake of their request
    computed_tokens: int
    recomputed_tokens: int  # computed once more after a preemption, output tokens too
    output_tokens: int
    drafted_tokens: int  # guesses of the next tokens that a step checked
    accepted_tokens: int  # of these, right ones: output tokens that took no step of their own
    evicted_tokens: int
    kv_blocks: int
    kv_free_blocks: int
    kv_bytes: int
    kv_used_bytes: int
    step_s: float  # in steps, all together
    forward_s: float  # of that, in the model and the sampler
    last_batch_rows: int
    # All that each lower tier brought up, ahead of requests or for those that were then preempted
    # or cancelled too.
    fetched_tokens: Mapping[TierName, int] = field(factory=dict)
    failed_loads: int = 0  # computed after all
    lower: LowerStats | None = None  # of the tiers below the device, if there are any
    disk_problem: str | None = None  # why there is no disk tier, though one was wanted

    @property
    def overhead(self) -> float:
        """The share of step time that was not the model: scheduling, cache, text, events."""
        return 1 - self.forward_s / self.step_s if self.step_s else 0.0


@define
class Counters:
    """Owned by the step thread; only it writes."""

    finished: int = 0
    cancelled: int = 0
    preempted: int = 0
    steps: int = 0
    output_tokens: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    last_batch_rows: int = 0
