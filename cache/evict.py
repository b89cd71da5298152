"""What a cached node is worth, and the queue that yields the least worthy leaf.

Worth is the rate at which keeping a node pays: the chance that it is used again, times the
seconds that its being here saves then, per byte of it and per second until then. Whoever waits
furthest from a likely use goes first, which is Belady's rule with an estimate for the future.
The estimate comes from what the session does (a tool is expected back in so many seconds) or,
where no session is known, from the past: a node is away for as long again as it has been.
"""

import enum
import math
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from attrs import field, frozen
from attrs.validators import gt

from agentrt.errors import CacheCorrupt

# The chance of another use after n of them, for uses that nobody announced: the mean of a Beta
# distribution, which reads as FIRST_USES uses in FIRST_TRIALS trials before the first one.
FIRST_USES = 0.3
FIRST_TRIALS = 1.3
MAX_COUNTED_HITS = 4  # more tell little more, and each count costs the queue a group
# After this long without a use the earlier ones tell nothing: on the mooncake trace those that
# came back often are then no likelier to come again than the others.
STALE_S = 600.0
NEAREST_S = 0.1  # a use that is nearer than this counts as this far away


class SessionState(enum.Enum):
    """What the session whose log ends in a node is doing."""

    RUNNING = "running"
    TOOL_PENDING = "tool pending"
    IDLE = "idle"
    CLOSED = "closed"
    SUPERSEDED = "superseded"


DEAD_STATES = frozenset({SessionState.CLOSED, SessionState.SUPERSEDED})

# The chance that a session in this state goes on.
RETURN_CHANCE = {
    SessionState.RUNNING: 0.9,
    SessionState.TOOL_PENDING: 0.9,
    SessionState.IDLE: 0.7,
}
# The wait to assume where nobody has a prediction; an idle session has none, as people go away.
UNKNOWN_WAIT_S = {SessionState.RUNNING: 5.0, SessionState.TOOL_PENDING: 1.0}
# The quantiles 1/2, 3/4, 7/8 ... of a normal distribution, in standard deviations: each is the
# median of what is left once the one before it has passed.
QUANTILES = (0.0, 0.674, 1.150, 1.534, 1.863, 2.154, 2.418, 2.660, 2.886)
# The same of a log-normal wait, in medians: what to expect once the one before has passed. Turns
# are predictable, people are not: the logarithm's standard deviation is 0.25, 1 and 1.5. Of a
# turn every other one does, they lie that close together.
OVERDUE = {
    SessionState.RUNNING: tuple(math.exp(0.25 * step) for step in QUANTILES[::2]),
    SessionState.TOOL_PENDING: tuple(math.exp(step) for step in QUANTILES),
    SessionState.IDLE: tuple(math.exp(1.5 * step) for step in QUANTILES),
}

MIN_HEAP_ENTRIES = 64


@frozen(kw_only=True)
class TierRates:
    """What it costs to have a token's KV on the device again: all that a tier's worth rests on."""

    compute_s_per_token: float = field(default=1e-3, validator=gt(0.0))  # at depth 0
    # At this depth attention over the context costs as much as the projections of the token.
    attention_knee_tokens: float = field(default=4096.0, validator=gt(0.0))
    load_s_per_token: float = 0.0  # from the tier itself; none from the device
    below_load_s_per_token: float = math.inf  # from the tier below, where that has the node too
    token_bytes: int = field(default=1, validator=gt(0))
    predicts: bool = True  # False: every node counts the same but for its age, which is plain LRU


class NodeFacts(Protocol):
    """What the worth of a node depends on."""

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_children(self) -> int: ...
    @property
    def last_used_s(self) -> float: ...
    @property
    def num_hits(self) -> int: ...
    @property
    def is_below(self) -> bool: ...  # whether the tier below holds it too
    @property
    def state(self) -> SessionState | None: ...
    @property
    def marked_s(self) -> float: ...  # when the state was noted
    @property
    def expected_s(self) -> float | None: ...  # median time from then to the next turn


class Candidate(NodeFacts, Protocol):
    """A node as the queue sees it: the queue alone writes `queued`."""

    queued: int  # serial number of its entry, 0 without one

    @property
    def attached(self) -> bool: ...


class Inheritor(NodeFacts, Protocol):
    """A node that can take over what is known of a session."""

    state: SessionState | None
    marked_s: float
    expected_s: float | None


def compute_s(node: NodeFacts, rates: TierRates) -> float:
    """Seconds to compute the node again; deep tokens attend to more."""
    middle = node.start + node.num_tokens / 2
    return node.num_tokens * rates.compute_s_per_token * (1 + middle / rates.attention_knee_tokens)


def saving_s(node: NodeFacts, rates: TierRates) -> float:
    """Seconds that a use saves because the node is in this tier and not only below it."""
    otherwise_s = compute_s(node, rates)
    if node.is_below:
        otherwise_s = min(otherwise_s, node.num_tokens * rates.below_load_s_per_token)
    return max(0.0, otherwise_s - node.num_tokens * rates.load_s_per_token)


def wait_s(node: NodeFacts) -> float | None:
    """The median wait from the mark to the session's next turn; None if nothing tells."""
    if node.state is None or node.state in DEAD_STATES:
        return None
    return UNKNOWN_WAIT_S.get(node.state) if node.expected_s is None else node.expected_s


def next_use_s(node: NodeFacts, now: float) -> float | None:
    """The time at which the session's next turn is expected; None if nothing tells.

    That is the first of the wait's quantiles in OVERDUE that has not passed, so it stays the same
    until it passes. Far behind them it is as long again as the wait has taken.
    """
    wait = wait_s(node)
    if wait is None or node.state is None:
        return None
    wait = max(wait, 0.0) + NEAREST_S
    for factor in OVERDUE[node.state]:
        if (due_s := node.marked_s + wait * factor) > now:
            return due_s
    waited_s = due_s - node.marked_s
    while (due_s := node.marked_s + waited_s) <= now:
        waited_s *= 2
    return due_s


def use_chance(node: NodeFacts, now: float) -> float:
    """The chance that the node is used again: none if its session is over."""
    state = node.state
    if state is not None:
        if state in DEAD_STATES:
            return 0.0
        if wait_s(node) is not None:
            return RETURN_CHANCE[state]
    is_stale = now >= node.last_used_s + STALE_S
    num_hits = 0 if is_stale else min(node.num_hits, MAX_COUNTED_HITS)
    return (num_hits + FIRST_USES) / (num_hits + FIRST_TRIALS)


def weight(node: NodeFacts, now: float, rates: TierRates) -> float:
    """Chance times saving per byte, a power of two of it, so that there are few weights."""
    if not rates.predicts:
        return 1.0
    rate = saving_s(node, rates) / (node.num_tokens * rates.token_bytes)
    return use_chance(node, now) * 2.0 ** (math.frexp(rate)[1] - 1) if rate else 0.0


def distance_s(node: NodeFacts, now: float) -> float:
    """Seconds until the next use, as far as anything tells."""
    due_s = next_use_s(node, now)
    return now - node.last_used_s if due_s is None else due_s - now


def worth(node: NodeFacts, now: float, rates: TierRates) -> float:
    """Seconds saved per byte and second of keeping the node; endless for one with children."""
    if node.num_children:
        return math.inf
    return weight(node, now, rates) / max(NEAREST_S, distance_s(node, now))


def inherit(parent: Inheritor, leaf: NodeFacts) -> None:
    """Leave what is known of a leaf's session to its parent, where the rest of the log ends now.

    Of two sessions the one that is expected sooner counts, as things stood at the last use.
    """
    now = max(parent.last_used_s, leaf.marked_s)
    leaf_s, own_s = next_use_s(leaf, now), next_use_s(parent, now)
    if leaf_s is not None and (own_s is None or leaf_s < own_s):
        parent.state, parent.marked_s = leaf.state, leaf.marked_s
        parent.expected_s = leaf.expected_s


CandidateT = TypeVar("CandidateT", bound=Candidate)
# A group's key: the weight of its nodes, and whether a session tells when they are used next.
Group = tuple[float, bool]


class EvictionQueue(Generic[CandidateT]):
    """Leaves of one tier in the order in which they should go.

    Nodes of one weight keep their order as time goes by: the longest unused goes first or, where
    a session tells, the one whose next use is furthest. So each weight has a lazy heap, and the
    least worthy is one of few heads. `_due` tells when a prediction passes and is made again.

    Invariant: each leaf has an entry that makes it no worthier than it is. Rising worth (a use)
    touches nothing here and is found when the entry comes up; falling worth must be told through
    `offer`. An entry is void if its serial number is not the node's or the node is gone.
    """

    def __init__(self, rates: TierRates | None = None) -> None:
        self._rates = TierRates() if rates is None else rates
        self._heaps: dict[Group, list[tuple[float, int, CandidateT]]] = {}
        self._due: list[tuple[float, int, CandidateT]] = []
        self._now = -math.inf
        self._serial = 0
        self._num_entries = 0
        self._compact_at = MIN_HEAP_ENTRIES

    def __len__(self) -> int:
        return self._num_entries

    def __repr__(self) -> str:
        return f"<EvictionQueue {self._num_entries} entries in {len(self._heaps)} groups>"

    def offer(self, node: CandidateT) -> None:
        """Make sure that `node` comes up in time, if it is a leaf; call whenever worth falls."""
        if not node.num_children:
            self._push(node)

    def pop(self, now: float) -> CandidateT | None:
        """Take out the leaf of least worth; the caller removes it or offers it again."""
        self._now = now
        self._predict_again()
        while self._heaps:
            group = min(self._heaps, key=self._head_worth)
            rank, serial, node = self._take(group)
            if not self._is_live(serial, node):
                continue
            if self._place(node) == (group, rank):
                node.queued = 0
                return node
            self._push(node)  # its worth has risen since
        return None

    def check(self, leaves: Iterable[CandidateT]) -> None:
        """Raise CacheCorrupt unless each of `leaves` would come up in time."""
        entries = {
            serial: (group, rank)
            for group, heap in self._heaps.items()
            for rank, serial, _ in heap
        }  # fmt: skip
        if len(entries) != self._num_entries:
            raise CacheCorrupt(f"{len(entries)} entries, counted otherwise: {self!r}")
        for leaf in leaves:
            entry = entries.get(leaf.queued)
            if entry is None:
                raise CacheCorrupt(f"{leaf!r} is a leaf and not in the queue")
            real = worth(leaf, self._now, self._rates)
            if self._worth(*entry) > real * (1 + 1e-9) and entry != self._place(leaf):
                raise CacheCorrupt(f"{leaf!r} is worth less than its place in the queue")

    def _place(self, node: CandidateT) -> tuple[Group, float]:
        """The group of a node and its rank there; the lowest rank goes first."""
        value = weight(node, self._now, self._rates)
        if not value:
            # Nearest to the root is what another session is likeliest to begin with as well.
            return (0.0, False), -node.start
        due_s = next_use_s(node, self._now)
        rank = node.last_used_s if due_s is None else -due_s
        return (value, due_s is not None), rank

    def _worth(self, group: Group, rank: float) -> float:
        value, is_known = group
        distance = -rank - self._now if is_known else self._now - rank
        return value / max(NEAREST_S, distance)

    def _head_worth(self, group: Group) -> float:
        return self._worth(group, self._heaps[group][0][0])

    def _push(self, node: CandidateT) -> None:
        group, rank = self._place(node)
        self._serial += 1  # breaks ties: nodes do not compare
        node.queued = self._serial
        heappush(self._heaps.setdefault(group, []), (rank, self._serial, node))
        if (again_s := self._falls_s(node, group, rank)) > self._now:
            heappush(self._due, (again_s, self._serial, node))
        self._num_entries += 1
        if max(self._num_entries, len(self._due)) > self._compact_at:
            self._compact()

    def _falls_s(self, node: CandidateT, group: Group, rank: float) -> float:
        """When the node changes its place without being told; in the past if it never does."""
        value, is_known = group
        if is_known:
            return -rank
        return node.last_used_s + STALE_S if value and node.num_hits else -math.inf

    def _take(self, group: Group) -> tuple[float, int, CandidateT]:
        heap = self._heaps[group]
        entry = heappop(heap)
        self._num_entries -= 1
        if not heap:
            del self._heaps[group]
        return entry

    def _predict_again(self) -> None:
        while self._due and self._due[0][0] <= self._now:
            _, serial, node = heappop(self._due)
            if self._is_live(serial, node):
                self._push(node)

    def _is_live(self, serial: int, node: CandidateT) -> bool:
        return node.queued == serial and node.attached and not node.num_children

    def _live(
        self, heap: list[tuple[float, int, CandidateT]]
    ) -> Iterator[tuple[float, int, CandidateT]]:
        return (entry for entry in heap if self._is_live(entry[1], entry[2]))

    def _compact(self) -> None:
        """Drop void entries, which else pile up while nothing is evicted."""
        heaps = {group: list(self._live(heap)) for group, heap in self._heaps.items()}
        self._heaps = {group: heap for group, heap in heaps.items() if heap}
        self._due = list(self._live(self._due))
        for heap in [self._due, *self._heaps.values()]:
            heapify(heap)
        self._num_entries = sum(len(heap) for heap in self._heaps.values())
        self._compact_at = max(MIN_HEAP_ENTRIES, 2 * self._num_entries)
