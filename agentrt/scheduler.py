"""Which requests run in the next step, and how many tokens of each. No tensor, clock or I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field, frozen

from agentrt.cache.evict import SessionState
from agentrt.cache.node import num_common
from agentrt.errors import CacheCorrupt
from agentrt.explain import SHOWN_TOKENS, Admission, Admissions
from agentrt.order import Found, Order
from agentrt.origins import Tally
from agentrt.pauses import Pauses
from agentrt.request import Request, State
from agentrt.speculate import Drafter

if TYPE_CHECKING:
    from agentrt.cache import Copy, PrefixCache
    from agentrt.config import ResolvedConfig
    from agentrt.mover import Mover
    from agentrt.types import TierName

# How soon after each other waiting requests are expected on the device, when room is made for the
# first of them. Between 0.03 and 0.3 s their agents take the same time; what counts is that they
# are expected in this order, and before the sessions whose tools still run.
EXPECTED_APART_S = 0.1
# An agent's next request often follows at once: so long nothing is begun that can wait.
LULL_S = 0.002
# Waiting for another request's prefix pays from this many tokens on.
WORTH_WAITING_TOKENS = 16


@frozen
class Work:
    """One request's share of a step: compute tokens [start, start + num_tokens). The last
    `num_draft` of them are guesses, which the rows before them check."""

    request: Request
    start: int
    num_tokens: int
    num_draft: int = 0

    @property
    def samples(self) -> bool:
        """Whether the last row's logits give the request's next token."""
        return self.num_known == self.request.num_tokens and not self.request.is_prefill

    @property
    def num_known(self) -> int:
        """Tokens that are computed when it is done, whatever becomes of the draft."""
        return self.start + self.num_tokens - self.num_draft


@frozen
class Plan:
    """One step: decode rows and drafts, then prefill chunks; and block copies to make before."""

    work: tuple[Work, ...]
    copies: tuple[Copy, ...]

    @property
    def num_rows(self) -> int:
        return sum(work.num_tokens for work in self.work)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Tokens [start, end) of each prefill chunk of more than one."""
        return [
            (work.start, work.start + work.num_tokens)
            for work in self.work
            if work.num_tokens > 1 + work.num_draft
        ]


@define
class Scheduler:
    """Owns the queues, and through leases the blocks of every running request.

    Invariants: a request is in `waiting` (state WAITING, no lease) or in `running` (PREFILL or
    DECODE, a lease with room for all its known tokens), never in both; `running` is in order of
    admission and no longer than max_batch. A plan's rows never pass step_tokens.
    """

    config: ResolvedConfig
    cache: PrefixCache
    mover: Mover | None = None  # where there are tiers below the device
    pauses: Pauses = field()
    drafter: Drafter | None = None  # where the runner checks drafts
    waiting: list[Request] = field(factory=list)
    running: list[Request] = field(factory=list)
    num_preempted: int = 0
    is_short: bool = False  # whether the last plan found too few blocks
    admissions: Admissions = field(factory=Admissions)
    origins: Tally = field(factory=Tally)  # of all prompts
    order: Order = field()

    @pauses.default
    def _no_pauses(self) -> Pauses:
        return Pauses(self.cache, self.mover, namespace="")

    @order.default
    def _order(self) -> Order:
        return Order(self.cache, self.mover)

    @property
    def is_awaited(self) -> bool:
        """Whether a caller waits for the first token of a request that runs, and no other request
        for blocks, some of which saves may keep from it."""
        return not self.is_short and any(
            each.first_token_s is None and not each.is_prefill for each in self.running
        )

    def idle_s(self, now: float) -> float | None:
        """How long nothing needs to be done, if nothing comes; None: for ever."""
        is_behind = self.mover is not None and self.mover.is_behind
        return LULL_S if is_behind else self.pauses.idle_s(now)

    def submit(self, request: Request) -> None:
        request.origins.total = self.origins
        since_s = self.pauses.waiting_since(request.known)
        request.waiting_since_s = request.submitted_s if since_s is None else since_s
        self.waiting.append(request)

    def plan(self, now: float) -> Plan:
        """Choose the next step's work. Empty when nothing can run."""
        copies: list[Copy] = []
        self.is_short = False
        self._make_room(now)
        work = self._decode_rows(now)
        budget = self.config.step_tokens - sum(one.num_tokens for one in work)
        for request in self.running:
            if request.state is State.PREFILL and budget > 0:
                self._take_load(request, now)
                budget -= self._add_chunk(work, request, budget)
        candidates = self._candidates(now, budget)
        for rank, request in enumerate(candidates):
            if budget <= 0 or len(self.running) >= self.config.max_batch:
                break
            if self._shares_running_prefill(request):
                continue
            self._expect(candidates[rank:], now)
            admitted = self._admit(request, now)
            if admitted is None:
                self.is_short = True
                break  # the next in line must not be overtaken for ever by smaller ones
            copies += admitted
            budget -= self._add_chunk(work, request, budget)
        return Plan(tuple(work), tuple(copies))

    def computed(self, work: Work, now: float) -> None:
        """Note that `work` was done; prefill becomes shareable at once."""
        request = work.request
        request.num_computed = work.num_known
        if request.state is State.PREFILL:
            request.origins.computed(work.start, work.num_known)
            self._commit(request, now)
            if request.num_computed == request.num_tokens:
                request.state = State.DECODE

    def checked(self, work: Work, num_right: int) -> None:
        """Learn from a draft: how many of its tokens were right."""
        if self.drafter is not None and work.num_draft:
            self.drafter.checked(work.request, work.num_draft, num_right)

    def finish(self, request: Request, now: float) -> None:
        """Take a request out, whatever its state; its KV stays in the cache."""
        if request.state is State.WAITING:
            self.order.left(request, self.waiting, to_run=False)
            self.waiting.remove(request)
        elif request.state is not State.FINISHED:
            self._release(request, now)
        request.state = State.FINISHED
        if self.drafter is not None:
            self.drafter.finished(request)

    def _decode_rows(self, now: float) -> list[Work]:
        """A row for each decoding request, and its draft where there is room for one."""
        decoding = [request for request in self.running if wants_token(request)]
        if self.drafter is None:
            return [Work(request, request.num_computed, 1) for request in decoding]
        drafts = self.drafter.draft_step(decoding, self.config.step_tokens)
        work = []
        for request, num_draft in zip(decoding, drafts, strict=True):
            assert request.lease is not None
            if num_draft and not self.cache.extend(
                request.lease, request.num_tokens + num_draft, now
            ):
                num_draft = 0  # nobody is preempted for a draft
            work.append(Work(request, request.num_computed, 1 + num_draft, num_draft))
        return work

    def _add_chunk(self, work: list[Work], request: Request, budget: int) -> int:
        """The next prefill tokens, none of those that are being loaded; how many they are."""
        end = request.num_tokens if request.load is None else request.load.start
        num_tokens = min(end - request.num_computed, budget)
        if num_tokens:
            work.append(Work(request, request.num_computed, num_tokens))
        return num_tokens

    def _take_load(self, request: Request, now: float) -> None:
        """Go on behind what was loaded, once all before it is computed; or compute it after all."""
        load = request.load
        if load is None or not load.has_ended:
            return
        if load.tokens_by_tier is None:
            request.load = None
        elif request.num_computed == load.start:
            request.load, request.num_computed = None, load.end
            request.origins.loaded(load.start, load.end, load.tokens_by_tier)
            self._commit(request, now)
            if self.mover is not None:
                self.mover.promoted(request.tokens[: request.num_computed])

    def _candidates(self, now: float, budget: int) -> list[Request]:
        """Those that may be admitted, the next one first."""
        if budget <= 0 or len(self.running) >= self.config.max_batch or not self.waiting:
            return []
        return self.order.of(self.waiting, now)

    def _expect(self, candidates: list[Request], now: float) -> None:
        """Before something must go for the first of these: tell eviction when each is due."""
        first = candidates[0]
        num_cached = self.order.found(first).match.num_tokens
        if self.cache.would_evict(num_cached, first.num_tokens + 1):
            for rank, request in enumerate(candidates):
                due_s = rank * EXPECTED_APART_S
                self.pauses.mark(request.known, SessionState.RUNNING, now, due_s)

    def _shares_running_prefill(self, request: Request) -> bool:
        """Whether a running request is about to compute a prefix that this one could use."""
        resident = None
        for other in self.running:
            if other.state is not State.PREFILL or other.namespace != request.namespace:
                continue
            common = num_common(request.known, other.known)
            usable = min(common, request.num_tokens - 1)
            if usable <= other.num_computed:
                continue
            if resident is None:
                resident = self.order.found(request).match.num_tokens
            if usable - resident >= WORTH_WAITING_TOKENS:
                return True
        return False

    def _admit(self, request: Request, now: float) -> list[Copy] | None:
        """Lease blocks for all known tokens and one more. None if they are not to be had now."""
        found = self.order.found(request)
        kept = () if self.mover is None or found.stored is None else self.mover.keep(found.stored)
        try:
            return self._admit_kept(request, found, now)
        finally:
            if self.mover is not None:
                self.mover.tiers.unpin(kept)

    def _admit_kept(self, request: Request, found: Found, now: float) -> list[Copy] | None:
        got = self.cache.acquire(
            request.known,
            num_tokens=request.num_tokens + 1,
            now=now,
            namespace=request.namespace,
            match=found.match,
        )
        if got is None:
            if not self.running and not (self.mover and self.mover.num_in_flight):
                raise CacheCorrupt(f"an idle pool cannot hold {request.num_tokens + 1} tokens")
            return None
        request.lease, copies = got
        request.num_computed = request.lease.num_cached_tokens
        request.origins.found(request.num_computed)
        if self.mover is not None and found.stored is not None:
            request.load = self.mover.load(request.known[:-1], request.lease, now, found.stored)
        if not request.admitted:
            request.admitted = True
            self._note_admission(request, found)
        request.state = State.PREFILL
        self.order.left(request, self.waiting, to_run=True)
        self.waiting.remove(request)
        self.running.append(request)
        return list(copies)

    def _note_admission(self, request: Request, found: Found) -> None:
        """Keep what `Engine.explain` tells of it."""
        matched: dict[TierName, int] = {"device": request.num_computed}
        end = request.num_computed
        if self.mover is not None and request.load is not None:
            matched |= self.mover.planned_tokens(request.load)
            end = request.load.end
        other = self.cache.continuation(found.match, request.namespace)
        admission = Admission(
            token_ids=request.tokens[: request.num_prompt_tokens].copy(),
            matched_tokens=matched,
            other=other[:SHOWN_TOKENS].copy(),
            is_rewritten=request.is_rewritten,
        )
        self.admissions.note(request.id, admission, end)

    def _make_room(self, now: float) -> None:
        """Extend every decoding request by a token; preempt the youngest while blocks lack.

        The oldest always gets room: admission refused what the whole pool cannot hold.
        """
        for request in list(self.running):
            while wants_token(request) and not self._extend(request, now):
                self._preempt(self.running[-1], now)

    def _extend(self, request: Request, now: float) -> bool:
        assert request.lease is not None
        return self.cache.extend(request.lease, request.num_tokens, now)

    def _preempt(self, request: Request, now: float) -> None:
        """Back to the queue's head: its KV stays in the cache until others need the blocks."""
        self.is_short = True
        self._release(request, now)
        request.state = State.WAITING
        request.num_computed = 0
        request.load = None
        self.waiting.insert(0, request)
        self.num_preempted += 1

    def _commit(self, request: Request, now: float) -> None:
        assert request.lease is not None
        self.cache.commit(request.lease, request.tokens[: request.num_computed], now)

    def _release(self, request: Request, now: float) -> None:
        assert request.lease is not None
        self._commit(request, now)
        if self.mover is not None:
            self.mover.save(request.lease, request.tokens[: request.num_computed], now)
        self.cache.release(request.lease)
        request.lease = None
        self.running.remove(request)

    def check(self) -> None:
        """Raise CacheCorrupt if an invariant of the queues or the cache does not hold."""
        self.cache.check()
        if self.mover is not None:
            self.mover.tiers.check()
        for request in self.waiting:
            if request.state is not State.WAITING or request.lease is not None:
                raise CacheCorrupt(f"{request.id} waits in state {request.state} with a lease")
        for request in self.running:
            if request.state not in (State.PREFILL, State.DECODE) or request.lease is None:
                raise CacheCorrupt(f"{request.id} runs in state {request.state} without a lease")
        if len(self.running) > self.config.max_batch:
            raise CacheCorrupt(
                f"{len(self.running)} requests run, max_batch is {self.config.max_batch}"
            )


def wants_token(request: Request) -> bool:
    """Whether it decodes, and its last token is not being sampled already."""
    return request.state is State.DECODE and not request.is_full
