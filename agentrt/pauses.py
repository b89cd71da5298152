"""Pauses: sessions whose tools run. Their KV may go while they wait, and is fetched in time."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field, frozen
from xxhash import xxh3_128, xxh3_128_digest

from agentrt.cache.evict import SessionState
from agentrt.cache.latency import ToolLatencies

if TYPE_CHECKING:
    from agentrt.cache import PrefixCache
    from agentrt.cache.node import TokenArray
    from agentrt.mover import Mover

POLL_S = 0.05  # after this the disk tier is asked again that refused something
# What names a session: the number of tokens of its log, and their digest.
LogKey = tuple[int, bytes]
MOST_RETURNING = 256  # sessions whose tools have ended and whose next turn has not come yet


@frozen(kw_only=True)
class Pause:
    """One tool of a session that waits; `session` is equal for the tools of one turn."""

    session: LogKey
    token_ids: TokenArray
    name: str
    begin_s: float
    since_s: float  # when the first of the tools that its session waits for began
    due_s: float  # the median of what its tool takes


@define(eq=False)
class Pauses:
    """Owned by the step thread. A session waits until the last of its tools has ended.

    `mover` is there if there are tiers below the device. Invariant: `_fetched` holds only sessions
    that wait.
    """

    cache: PrefixCache
    mover: Mover | None
    namespace: str
    marks: bool = True  # whether eviction hears of it (not where it is to be plain LRU)
    latencies: ToolLatencies = field(factory=ToolLatencies)
    _pauses: dict[int, Pause] = field(factory=dict, init=False)
    _fetched: set[LogKey] = field(factory=set, init=False)
    _wanted: dict[LogKey, TokenArray] = field(factory=dict, init=False)  # found no room so far
    # Sessions that come back -> when they began to wait.
    _returning: OrderedDict[LogKey, float] = field(factory=OrderedDict, init=False)

    def mark(
        self,
        token_ids: TokenArray,
        state: SessionState,
        now: float,
        expected_s: float | None = None,
    ) -> None:
        """Tell every tier's eviction what the session whose log is `token_ids` does."""
        if not self.marks:
            return
        self.cache.mark(token_ids, state, now, self.namespace, expected_s)
        if self.mover is not None:
            self.mover.tiers.mark(token_ids, state, now, expected_s)

    def begin(self, number: int, token_ids: TokenArray, name: str, now: float) -> None:
        """A tool of the session whose log is `token_ids` starts."""
        session = _log_key(token_ids)
        pause = Pause(
            session=session,
            token_ids=token_ids,
            name=name,
            begin_s=now,
            since_s=min((other.since_s for other in self._of(session)), default=now),
            due_s=now + self.latencies.expected(name),
        )
        self._pauses[number] = pause
        due_s = max(other.due_s for other in self._of(pause.session))
        self.mark(token_ids, SessionState.TOOL_PENDING, now, due_s - now)

    def end(self, number: int, now: float) -> None:
        """A tool ended. With the last of its session, bring back what went: the turn goes on."""
        pause = self._pauses.pop(number)
        self.latencies.observe(pause.name, now - pause.begin_s)
        if not self._of(pause.session):
            self._fetched.discard(pause.session)
            self._returning[pause.session] = pause.since_s
            if len(self._returning) > MOST_RETURNING:
                self._returning.popitem(last=False)
            self.mark(pause.token_ids, SessionState.RUNNING, now)
            self._fetch(pause.session, pause.token_ids, now)

    def waiting_since(self, token_ids: TokenArray) -> float | None:
        """When the session that goes on with this prompt began to wait for its tools, if it did.
        It is asked once a prompt."""
        keys, digest, begin = [], xxh3_128(), 0
        for end in sorted({num for num, _ in self._returning if num <= len(token_ids)}):
            digest.update(np.ascontiguousarray(token_ids[begin:end]).tobytes())
            keys.append((end, digest.digest()))
            begin = end
        for key in reversed(keys):
            if (since_s := self._returning.pop(key, None)) is not None:
                return since_s
        return None

    def tick(self, now: float) -> None:
        """Bring back the sessions whose tools are due, or that found no room before."""
        for session, token_ids in list(self._wanted.items()):
            self._fetch(session, token_ids, now)
        for pause in list(self._pauses.values()):
            due_s = max(other.due_s for other in self._of(pause.session))
            if due_s <= now and pause.session not in self._fetched:
                self._fetched.add(pause.session)
                self._fetch(pause.session, pause.token_ids, now)

    def idle_s(self, now: float) -> float | None:
        """How long nothing needs to be done, if nothing else happens; None: for ever."""
        waiting = (p.due_s for p in self._pauses.values() if p.session not in self._fetched)
        due_s = min(waiting, default=None)
        if self.mover is not None and self.mover.tiers.wants_poll:
            due_s = now + POLL_S if due_s is None else min(due_s, now + POLL_S)
        return None if due_s is None else max(0.0, due_s - now)

    def _of(self, session: LogKey) -> list[Pause]:
        return [pause for pause in self._pauses.values() if pause.session == session]

    def _fetch(self, session: LogKey, token_ids: TokenArray, now: float) -> None:
        if self.mover is None or self.mover.prefetch(token_ids, now):
            self._wanted.pop(session, None)
        else:
            self._wanted[session] = token_ids


def _log_key(token_ids: TokenArray) -> LogKey:
    return len(token_ids), xxh3_128_digest(np.ascontiguousarray(token_ids).tobytes())
