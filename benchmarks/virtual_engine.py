"""The engine's own step loop, scheduler, cache and tiers, in virtual time and without a model.

What a step takes is computed from what it has to do (`Costs`), what a transfer takes from its
bytes; tokens are made up. So a workload of minutes runs in seconds, and twice alike. Nothing of the
product is modelled: commands, plans, evictions and transfers are those of `agentrt`.
"""

import random
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np
from attrs import define, field, frozen

from agentrt import EngineConfig, GenerateOptions
from agentrt.cache import Copy
from agentrt.cache.keys import Fingerprint
from agentrt.cache.split import cost_tokens
from agentrt.chat import NoText
from agentrt.engine_parts import build_loop
from agentrt.loop import Loop
from agentrt.mover import Demotion, Job
from agentrt.output import OutputText
from agentrt.precedence import Precedence
from agentrt.request import Request
from agentrt.scheduler import Plan, Work

KV_TOKEN_BYTES = 23040  # SmolLM2 in bfloat16
CONTEXT = 8192


@frozen(kw_only=True)
class Costs:
    """Seconds of a step and of a transfer: SmolLM2 on two cores, fitted to the steps of a run."""

    step_s: float = 0.006
    prefill_token_s: float = 0.75e-3  # at depth 0
    decode_row_s: float = 0.5e-3
    decode_key_s: float = 1.5e-6  # of each token of context
    byte_s: float = 1 / 3e9

    def step(self, plan: Plan) -> float:
        seconds = self.step_s
        for work in plan.work:
            end = work.start + work.num_tokens
            if work.num_tokens > 1:
                seconds += self.prefill_token_s * cost_tokens(work.start, end)
            else:
                seconds += self.decode_row_s + self.decode_key_s * end
        return seconds


@frozen
class Done:
    """A step that was computed: `tokens` for its samples."""

    sampling: tuple[Work, ...]
    tokens: tuple[int, ...]
    runs_ahead: bool = False


@define(eq=False)
class VirtualEngine:
    """Runs commands, steps and transfers in order of time; owner of the clock."""

    config: EngineConfig
    costs: Costs = field(factory=Costs)
    seed: int = 0
    now: float = 0.0
    num_decoded: int = 0
    loop: Loop = field(init=False)
    _rng: random.Random = field(init=False)
    _timers: list[tuple[float, int, Callable[[], None]]] = field(factory=list, init=False)
    _serial: int = field(default=0, init=False)
    _busy_until_s: float = field(default=0.0, init=False)  # the transfer thread
    _events: list[tuple[Any, Any]] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        resolved = self.config.resolve(
            device="cpu", kv_token_bytes=KV_TOKEN_BYTES, model_context_tokens=CONTEXT
        )
        fingerprint = Fingerprint(
            namespace="",
            model_digest="virtual",
            layout="",
            dtype="",
            arithmetic="",
            token_bytes=KV_TOKEN_BYTES,
        )
        self.loop, _ = build_loop(
            self.config,
            resolved,
            fingerprint,
            self,
            self._events.extend,
            Precedence(),
            device="cpu",
        )
        self.loop.clock = lambda: self.now
        if self.loop.transfers is not None:
            self.loop.transfers = self  # type: ignore[assignment]

    # ---- what the loop sees as its runner

    def copier(self) -> None:
        """Nothing is copied."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Nothing to copy."""

    def launch(self, plan: Plan) -> Done:
        self.now += self.costs.step(plan)
        sampling = tuple(work for work in plan.work if work.samples)
        self.num_decoded += len(sampling)
        return Done(sampling, tuple(self._rng.randrange(1, 49000) for _ in sampling))

    @property
    def draft_limits(self) -> None:
        return None

    def collect(self, ticket: Done) -> list[list[tuple[int, None]]]:
        return [[(token, None)] for token in ticket.tokens]

    def close(self) -> None:
        """Nothing to free."""

    # ---- what it sees as its transfer thread

    def submit(self, job: Job) -> None:
        seconds = {
            tier: num_tokens * KV_TOKEN_BYTES * self.costs.byte_s
            for tier, num_tokens in job.tokens_by_tier().items()
        }
        self._busy_until_s = max(self._busy_until_s, self.now) + sum(seconds.values())
        self.at(self._busy_until_s, lambda: self.loop.transferred(job, seconds))

    def save_now(self, demotion: Demotion) -> None:
        num_tokens = sum(part.end - part.first for part in demotion.parts)
        self.now += num_tokens * KV_TOKEN_BYTES * self.costs.byte_s

    # ---- the clock

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Do something at a time, or as soon after as no step runs."""
        self._serial += 1
        heappush(self._timers, (when_s, self._serial, action))

    def request(self, token_ids: list[int], num_output: int, sink: Callable[[Any], None]) -> None:
        """Submit a request for exactly `num_output` tokens."""
        self._serial += 1
        tokens = np.zeros(len(token_ids) + num_output, np.int32)
        tokens[: len(token_ids)] = token_ids
        self.loop.submit(
            Request(
                id=f"r{self._serial}",
                options=GenerateOptions(max_tokens=num_output, ignore_eos=True),
                namespace="",
                sink=sink,
                text=OutputText(NoText(), ()),
                tokens=tokens,
                num_prompt_tokens=len(token_ids),
                eos_token_ids=frozenset(),
                submitted_s=self.now,
            )
        )

    def run(self) -> None:
        """Until nothing is left to do."""
        while True:
            while self._timers and self._timers[0][0] <= self.now:
                heappop(self._timers)[2]()
            self._commands()
            self.loop._step()
            self._deliver()
            mover = self.loop.scheduler.mover
            is_behind = mover is not None and mover.is_behind
            if not self.loop._is_idle or self.loop._inbox or is_behind:
                continue
            if not self._timers:
                break
            idle_s = self.loop.scheduler.pauses.idle_s(self.now)
            next_s = self._timers[0][0]
            self.now = next_s if idle_s is None else min(next_s, self.now + max(idle_s, 1e-4))
        scheduler = self.loop.scheduler
        scheduler.check()
        if scheduler.waiting or scheduler.running:
            raise RuntimeError(f"nothing goes on, and requests wait: {scheduler.waiting}")

    def _commands(self) -> None:
        loop = self.loop
        while loop._inbox:
            loop._inbox.popleft()()
        loop.scheduler.pauses.tick(self.now)
        if loop.scheduler.mover is not None:
            loop.scheduler.mover.jobs()  # plans what is to be saved
            loop.scheduler.mover.tiers.poll()
            loop._start_transfers()
        self._deliver()

    def _deliver(self) -> None:
        while self._events:
            events, self._events[:] = list(self._events), []
            for sink, event in events:
                sink(event)
