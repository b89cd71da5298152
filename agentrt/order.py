"""Order: which waiting request is served next. No tensor, clock or I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import define, field, frozen

if TYPE_CHECKING:
    from agentrt.cache import PrefixCache
    from agentrt.cache.node import Match
    from agentrt.mover import Mover, Stored
    from agentrt.request import Request

# The longest waiting are looked at; the others are younger, and the look-up must stay cheap.
WINDOW = 64
# What any request takes besides its prefill, in prefill tokens: between 32 and 128 the agents of
# benchmarks/pressure.py take the same time, with 300 and more they begin to thrash.
OTHER_TOKENS = 64
# So many that came later may be admitted before a request: under overload its ratio alone would
# not do, as some of the small ones that came soon after it are always still there.
MOST_OVERTAKING = 32


@frozen
class Found:
    """Where a waiting request's tokens are, but for the last one, which is always computed.

    It is looked up once, and good for the admission too as long as nothing has changed.
    """

    versions: tuple[int, int]  # of the cache and of the tiers below it
    match: Match
    stored: Stored | None

    @property
    def num_tokens(self) -> int:
        """How many need not be computed."""
        loadable = 0 if self.stored is None else self.stored.loadable_tokens
        return self.match.num_tokens + loadable


@define
class Order:
    """The highest response ratio next: the time waited over the work until the first token. Time in
    tools counts: an agent whose tool was slow is behind the others already, and with it in the
    count those of benchmarks/pressure.py were done 2 % sooner (`--virtual`, 18 mixes).

    Work is what must be computed, so those go first whose KV is on the device or can be loaded:
    agents in mid-conversation, while it is still there. State: what was found of each of the window
    at a version of the cache, so that steps which only decode look nothing up; and by how many each
    that waits was overtaken.
    """

    cache: PrefixCache
    mover: Mover | None
    _version: int = field(default=-1, init=False)
    _found: dict[Request, Found] = field(factory=dict, init=False)
    _overtaken: dict[Request, int] = field(factory=dict, init=False)

    def of(self, waiting: Sequence[Request], now: float) -> list[Request]:
        """Those that can run, the next one first."""
        # One that was preempted goes before those that did not begin. While the device samples its
        # token it waits.
        ready = [request for request in waiting[:WINDOW] if request.num_pending == 0]
        known = self._found if self._version == self.cache.version else {}
        self._version = self.cache.version
        self._found = {
            request: known[request] if request in known else self._look(request)
            for request in ready
        }
        ages = {request: max(0.0, now - request.waiting_since_s) for request in ready}
        works = {
            request: request.num_tokens - self._found[request].num_tokens + OTHER_TOKENS
            for request in ready
        }

        def rank(request: Request) -> tuple[bool, float, int]:
            if request.admitted or self._overtaken.get(request, 0) >= MOST_OVERTAKING:
                return (False, 0.0, 0)
            # Of those that have not waited at all the least work goes first.
            return (True, -ages[request] / works[request], works[request])

        return sorted(ready, key=rank)

    def left(self, request: Request, waiting: Sequence[Request], *, to_run: bool) -> None:
        """A request is about to leave `waiting`: the older ones were overtaken if it is to run."""
        self._overtaken.pop(request, None)
        self._found.pop(request, None)
        for other in waiting if to_run else ():
            if other is request:
                break
            self._overtaken[other] = self._overtaken.get(other, 0) + 1

    def found(self, request: Request) -> Found:
        """What is here of a waiting request now."""
        found = self._found.get(request)
        if found is None or found.versions != self._versions:
            found = self._found[request] = self._look(request)
        return found

    @property
    def _versions(self) -> tuple[int, int]:
        return self.cache.version, 0 if self.mover is None else self.mover.tiers.version

    def _look(self, request: Request) -> Found:
        token_ids = request.known[:-1]
        match = self.cache.find(token_ids, request.namespace)
        stored = None if self.mover is None else self.mover.find(token_ids, match.num_tokens)
        return Found(self._versions, match, stored)
