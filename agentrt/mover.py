"""Mover: decides what KV moves between the device and the tiers below it. No tensor, clock or I/O.

It plans jobs; a transfer thread carries them out (`agentrt.transfer`) and tells when each is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from agentrt.cache.split import Piece, Rates, cost_tokens, load_from
from agentrt.request import Load
from agentrt.types import TierName

if TYPE_CHECKING:
    from agentrt.cache import Copy, Lease, PrefixCache
    from agentrt.cache.chunk import Chunk, StoredPrefix
    from agentrt.cache.lower import LowerTiers
    from agentrt.cache.node import Evicted, TokenArray
    from agentrt.cache.tier import Record

# What is done at a time of what nobody waits for, some 0.3 ms each.
MOST_WRITES = 8  # chunks that the disk's writer is given
MOST_CHUNKS = 48  # that get a slot in the host tier
# What a load brought, by tier, or None if it failed; and the time.
OnEnd = Callable[["Mapping[TierName, int] | None", float], None]


@frozen(kw_only=True)
class Part:
    """Tokens [first, end) of a path, between the bytes of one chunk and the device's blocks.

    The chunk holds tokens [start, start + num_tokens), in `view` (the host tier's memory) or under
    `record` (on disk).
    """

    start: int
    num_tokens: int
    first: int
    end: int
    view: Any = None
    record: Record | None = None

    @property
    def tier(self) -> TierName:
        return "disk" if self.record is not None else "host"

    def places(
        self, block_tokens: int, block_ids: tuple[int, ...]
    ) -> Iterator[tuple[int, int, int, int]]:
        """(block, offset in it, offset in the chunk, tokens) of each block that it touches."""
        position = self.first
        while position < self.end:
            index, offset = divmod(position, block_tokens)
            num = min(block_tokens - offset, self.end - position)
            yield block_ids[index], offset, position - self.start, num
            position += num


@frozen
class Stored:
    """What the tiers below have of a log of which the device has the first `have_tokens`."""

    have_tokens: int
    prefix: StoredPrefix
    span: tuple[int, int] | None  # what is better loaded than computed
    version: int  # of the tiers: at another one it must be looked up again

    @property
    def loadable_tokens(self) -> int:
        return 0 if self.span is None else self.span[1] - self.span[0]


@define(eq=False)
class Unplanned:
    """A log that is to be saved, and its chunks that are to be: those found so far."""

    lease: Lease
    token_ids: TokenArray
    now: float
    chunks: list[Chunk] = field(factory=list)
    parts: list[Part] = field(factory=list)


@define(eq=False, kw_only=True)
class Job:
    """One transfer: its parts, and the blocks of the path, which are held until it ends."""

    is_load: bool
    parts: tuple[Part, ...]
    chunks: tuple[Chunk, ...]
    block_ids: tuple[int, ...]  # of the path: block i has tokens [i * block_tokens, ...)
    held: tuple[int, ...] = ()  # what a load writes
    lease: Lease  # what a save reads, or what a load goes on from: it may outlive the request's
    on_end: OnEnd | None = None  # of a load

    def tokens_by_tier(self) -> dict[TierName, int]:
        """How many tokens it moves from or to each tier."""
        counts: dict[TierName, int] = {}
        for part in self.parts:
            counts[part.tier] = counts.get(part.tier, 0) + part.end - part.first
        return counts


@frozen
class Demotion:
    """What the device evicted: to be copied before anything else is copied or computed."""

    parts: tuple[Part, ...]
    block_ids: tuple[int, ...]  # of the path


@define(eq=False)
class Mover:
    """Owned by the step thread. Jobs in flight hold their blocks and pin their chunks; what is not
    planned yet holds its blocks."""

    cache: PrefixCache
    tiers: LowerTiers
    rates: Rates
    overlaps: bool  # whether copies and compute run side by side
    namespace: str
    fetched_tokens: dict[TierName, int] = field(factory=lambda: {"host": 0, "disk": 0})
    failed_loads: int = 0
    demotes: bool = False  # whether a tier takes what the device evicts, and not each turn's end
    _unplanned: deque[Unplanned] = field(factory=deque, init=False)
    _planned: list[Job] = field(factory=list, init=False)
    _demoted: list[Demotion] = field(factory=list, init=False)
    _copies: list[Copy] = field(factory=list, init=False)
    _in_flight: set[Job] = field(factory=set, init=False)

    def drain(self) -> list[Job]:
        """The jobs that were planned since the last call, to be carried out in this order."""
        jobs, self._planned = self._planned, []
        self._in_flight.update(jobs)
        return jobs

    def jobs(self) -> set[Job]:
        """All that are planned, now at the latest, or under way."""
        while self.plan_save():
            pass
        return {*self._in_flight, *self._planned}

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight) + len(self._planned) + len(self._unplanned)

    @property
    def is_behind(self) -> bool:
        """Whether `tend` has more to do at once."""
        return bool(self._unplanned) or self.tiers.is_behind

    def tend(self) -> None:
        """A little of what nobody waits for: less than a millisecond of it."""
        self.tiers.poll(MOST_WRITES)
        self.plan_save()

    def note_step(self, chunks: Sequence[tuple[int, int]], num_rows: int, seconds: float) -> None:
        """Learn what prefill costs from a step, if it did little else."""
        num_tokens = sum(end - start for start, end in chunks)
        if num_tokens > num_rows / 2:
            cost = sum(cost_tokens(start, end) for start, end in chunks)
            self.rates.note_compute(num_tokens, cost, seconds)

    # ---- saving

    def save(self, lease: Lease, token_ids: TokenArray, now: float) -> None:
        """Save what of this log no lower tier has, by and by; the lease may be released after, and
        the tokens must not change."""
        if not self.demotes and len(token_ids):
            self._unplanned.append(Unplanned(self.cache.share(lease), token_ids, now))

    def plan_save(self) -> bool:
        """Plan the oldest save that is not, or a piece of it; False if there is none. This is not
        done where a request ends: the next one may come at once, and 256 new chunks take 2 ms.
        """
        if not self._unplanned:
            return False
        save = self._unplanned[0]
        last = save.chunks[-1] if save.chunks else None
        chunks = self.tiers.begin_save(
            save.token_ids, save.now, behind=last, most_chunks=MOST_CHUNKS
        )
        save.chunks += chunks
        save.parts += map(self._whole, chunks)
        if len(chunks) == MOST_CHUNKS:
            return True
        self._unplanned.popleft()
        if not save.chunks:
            self.cache.release(save.lease)
            return True
        self._planned.append(
            Job(
                is_load=False,
                parts=tuple(save.parts),
                chunks=tuple(save.chunks),
                block_ids=tuple(save.lease.block_ids),
                lease=save.lease,
            )
        )
        return True

    def evicted(self, evicted: Evicted, now: float) -> None:
        """Plan to keep what the device must let go of."""
        chunks = self.tiers.take_evicted(evicted, now)
        if chunks:
            parts = tuple(self._whole(chunk) for chunk in chunks)
            self._demoted.append(Demotion(parts, tuple(evicted.block_ids)))

    def take_demotions(self) -> list[Demotion]:
        """What must be copied now, in this order."""
        demoted, self._demoted = self._demoted, []
        return demoted

    def take_copies(self) -> list[Copy]:
        """What must be copied next, inside the device's pool."""
        copies, self._copies = self._copies, []
        return copies

    def keep(self, stored: Stored) -> tuple[Chunk, ...]:
        """Pin what the tiers have of a log, while room is made for it on the device: what goes
        there might take its place here."""
        if not self.demotes:
            return ()
        self.tiers.pin(stored.prefix.chunks)
        return stored.prefix.chunks

    def promoted(self, token_ids: TokenArray) -> None:
        """The device has these again, to be found by all."""
        if self.demotes:
            self.tiers.promoted(token_ids)

    def _whole(self, chunk: Chunk) -> Part:
        return Part(
            start=chunk.start,
            num_tokens=len(chunk.token_ids),
            first=chunk.start,
            end=chunk.end,
            view=self.tiers.slot_view(chunk),
        )

    # ---- loading

    def find(self, token_ids: TokenArray, have_tokens: int) -> Stored:
        """What the tiers have of a log, where the device has the first tokens."""
        prefix = self.tiers.match(token_ids, have_tokens)
        span = self._span(have_tokens, prefix)
        return Stored(have_tokens, prefix, span, self.tiers.version)

    def planned_tokens(self, load: Load) -> dict[TierName, int]:
        """What a load that was just planned will bring."""
        (job,) = [job for job in self._planned if job.on_end == load.ended]
        return job.tokens_by_tier()

    def load(self, token_ids: TokenArray, lease: Lease, now: float, stored: Stored) -> Load | None:
        """Plan to load what a fresh lease lacks of `token_ids`; None where computing is faster.
        `stored` was found before the lease was had, and counts if it still holds."""
        have_tokens = lease.num_cached_tokens
        if (stored.have_tokens, stored.version) != (have_tokens, self.tiers.version):
            stored = self.find(token_ids, have_tokens)
        if stored.span is None:
            return None
        self.tiers.hit(stored.prefix, now)
        load = Load(*stored.span)
        self._load(stored.prefix, stored.span, lease, load.ended)
        return load

    def prefetch(self, token_ids: TokenArray, now: float) -> bool:
        """Plan to bring a log's KV to the device, where that is faster than computing it. False if
        there is no room now."""
        have_tokens = self.cache.peek(token_ids, self.namespace)
        stored = self.find(token_ids, have_tokens)
        prefix, span = stored.prefix, stored.span
        if span is None or span[0] > have_tokens:
            return True
        self.tiers.pin(prefix.chunks)
        try:
            return self._prefetch(token_ids, have_tokens, prefix, now)
        finally:
            self.tiers.unpin(prefix.chunks)

    def _prefetch(
        self, token_ids: TokenArray, have_tokens: int, prefix: StoredPrefix, now: float
    ) -> bool:
        got = self.cache.acquire(
            token_ids[: prefix.num_tokens + 1],
            num_tokens=prefix.num_tokens,
            now=now,
            namespace=self.namespace,
            max_cached_tokens=have_tokens,
        )
        if got is None:
            return False
        lease, copies = got
        if lease.num_cached_tokens < have_tokens:  # no room for a copy of the block in question
            self.cache.release(lease)
            return False
        self._copies += copies
        span = (have_tokens, prefix.num_tokens)

        def end(tokens_by_tier: Mapping[TierName, int] | None, now: float) -> None:
            if tokens_by_tier is not None:
                self.cache.commit(lease, token_ids[: span[1]], now)
                self.promoted(token_ids[: span[1]])
            self.cache.release(lease)

        self._load(prefix, span, lease, end)
        return True

    def _span(self, have_tokens: int, prefix: StoredPrefix) -> tuple[int, int] | None:
        if prefix.num_tokens <= have_tokens:
            return None
        pieces = [
            Piece(chunk.start, min(chunk.end, prefix.num_tokens), _tier(chunk))
            for chunk in prefix.chunks
            if chunk.end > have_tokens
        ]
        start = load_from(
            have_tokens, pieces, self.tiers.token_bytes, self.rates, overlaps=self.overlaps
        )
        return None if start is None else (start, prefix.num_tokens)

    def _load(
        self, prefix: StoredPrefix, span: tuple[int, int], lease: Lease, on_end: OnEnd
    ) -> None:
        start, end = span
        chunks = [chunk for chunk in prefix.chunks if chunk.end > start]
        self.tiers.pin(chunks)
        parts = []
        for chunk in chunks:
            in_host = chunk.host is not None and chunk.host.is_ready
            parts.append(
                Part(
                    start=chunk.start,
                    num_tokens=len(chunk.token_ids),
                    first=max(chunk.start, start),
                    end=min(chunk.end, end),
                    view=self.tiers.slot_view(chunk) if in_host else None,
                    record=None if in_host else self.tiers.record(chunk),
                )
            )
        block_tokens = self.cache.block_tokens
        held = tuple(lease.block_ids[start // block_tokens : -(-end // block_tokens)])
        self.cache.hold(held)
        self._planned.append(
            Job(
                is_load=True,
                parts=tuple(parts),
                chunks=tuple(chunks),
                block_ids=tuple(lease.block_ids),
                held=held,
                lease=self.cache.share(lease),
                on_end=on_end,
            )
        )

    def finished(self, job: Job, seconds: dict[str, float] | None, now: float) -> None:
        """A job has ended: `seconds` that each tier took, or None if it failed."""
        self._in_flight.discard(job)
        self.cache.unhold(job.held)
        self.cache.release(job.lease)
        if not job.is_load:
            self.tiers.end_save(job.chunks, copied=seconds is not None)
            return
        self.tiers.unpin(job.chunks)
        counts = None if seconds is None else job.tokens_by_tier()
        if seconds is None or counts is None:
            self.failed_loads += 1
        else:
            for tier, num_tokens in counts.items():
                self.fetched_tokens[tier] += num_tokens
                self.rates.note_load(tier, num_tokens * self.tiers.token_bytes, seconds[tier])
        assert job.on_end is not None
        job.on_end(counts, now)


def _tier(chunk: Chunk) -> str:
    return "host" if chunk.host is not None and chunk.host.is_ready else "disk"
