"""Which tier below the device holds which chunk, where, and what each should let go of first."""

import math
from collections.abc import Iterator
from typing import Literal, final

from agentrt.cache.chunk import Chunk, ChunkIndex, Holding
from agentrt.cache.evict import EvictionQueue, TierRates, inherit, worth
from agentrt.cache.host import HostTier

TierName = Literal["host", "disk"]


@final
class Holdings:
    """Owner of the chunks' holdings, of the host tier's slots and of both eviction queues.

    Invariant: a chunk's `host` and `disk` are in their tier's queue as long as they have no
    children there, and what is pinned in the host tier is not evicted.
    """

    def __init__(
        self,
        index: ChunkIndex,
        host: HostTier,
        host_rates: TierRates | None,
        disk_rates: TierRates | None,
    ) -> None:
        self.host_evicted_tokens = 0
        self.version = 0  # another one whenever what can be read may be
        self.host_rates = TierRates() if host_rates is None else host_rates
        self._index = index
        self._host = host
        self._queues: dict[TierName, EvictionQueue[Holding]] = {
            "host": EvictionQueue(self.host_rates),
            "disk": EvictionQueue(disk_rates),
        }

    def __repr__(self) -> str:
        return f"<Holdings of {len(self._index)} chunks, {self._host!r}>"

    def hold(
        self, chunk: Chunk, tier: TierName, slot: int = -1, *, in_queue: bool = True
    ) -> Holding:
        """A tier has a copy of the chunk, or will have once it is `ready`. Without `in_queue` the
        caller must `offer` it before it lets go of the chunk's pin."""
        children = chunk.children.values()
        num_children = sum(getattr(child, tier) is not None for child in children)
        holding = Holding(chunk, slot, num_children=num_children)
        setattr(chunk, tier, holding)
        if tier == "host":
            holding.is_below = chunk.disk is not None
        elif chunk.host is not None:
            chunk.host.is_below = True
        assert chunk.parent is not None
        above: Holding | None = getattr(chunk.parent, tier)
        if above is not None:
            above.num_children += 1
        if in_queue:
            self._queues[tier].offer(holding)
        return holding

    def ready(self, holding: Holding) -> None:
        """The bytes are there."""
        holding.is_ready = True
        self.version += 1

    def let_go(self, chunk: Chunk, tier: TierName) -> None:
        """Take a tier's copy out of the books, if there is one."""
        holding: Holding | None = getattr(chunk, tier)
        if holding is None:
            return
        self.version += 1
        holding.attached = False
        setattr(chunk, tier, None)
        if tier == "host":
            self._host.give(holding.slot)
        elif chunk.host is not None:
            chunk.host.is_below = False
            self._queues["host"].offer(chunk.host)
        assert chunk.parent is not None
        above: Holding | None = getattr(chunk.parent, tier)
        if above is not None:
            above.num_children -= 1
            inherit(above, holding)
            self.offer(chunk.parent)  # the other tier's copy has the same session now
        self._index.prune(chunk)

    def let_go_below(self, chunk: Chunk) -> None:
        """Let the host tier go of what cannot be read any more without `chunk`."""
        waiting = list(chunk.children.values())
        while waiting:
            child = waiting.pop()
            waiting += child.children.values()
            if not child.num_pins:
                self.let_go(child, "host")

    def offer(self, chunk: Chunk) -> None:
        """Tell both queues that the chunk's worth may have fallen."""
        for holding, queue in (
            (chunk.host, self._queues["host"]),
            (chunk.disk, self._queues["disk"]),
        ):
            if holding is not None:
                queue.offer(holding)

    def reserve_slot(self, now: float, incoming: float = math.inf) -> int | None:
        """A free slot, if need be that of what is worth least and no more than `incoming`."""
        slot = self._host.take()
        if slot is not None:
            return slot
        kept: list[Holding] = []
        queue = self._queues["host"]
        while (holding := queue.pop(now)) is not None:
            if holding.chunk.num_pins:
                kept.append(holding)
                continue
            if worth(holding, now, self.host_rates) > incoming:
                kept.append(holding)
            else:
                self.host_evicted_tokens += holding.num_tokens
                self.let_go(holding.chunk, "host")
            break
        for other in kept:
            queue.offer(other)
        return self._host.take()

    def disk_victims(self, now: float) -> Iterator[Holding]:
        """What the disk tier should let go of, the least worthy first; those that the caller does
        not let go of must be offered again."""
        while (holding := self._queues["disk"].pop(now)) is not None:
            yield holding

    def check(self) -> None:
        """Raise CacheCorrupt unless the queues have all that may be evicted; for tests."""
        for name, queue in self._queues.items():
            held = [h for h in (getattr(chunk, name) for chunk in self._index) if h is not None]
            queue.check(h for h in held if not h.num_children and not h.chunk.num_pins)
