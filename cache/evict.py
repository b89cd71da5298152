"""What a tree node is worth, and the queue that yields the least worthy leaf.

Worth is counted in seconds of life: a node earns credits on top of its last use, so that the
order of two nodes never depends on the time at which they are compared. That is what lets one
lazy heap serve: entries stay right while nothing about the node changes. (A next-use estimate
that shrinks as the clock runs would rank pending tools better, but needs a scan per eviction.)
"""

import enum
import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from agentrt.errors import CacheCorrupt

# At this depth attention over the context costs about as much as the projections of the token.
ATTENTION_KNEE_TOKENS = 4096
COST_CREDIT_S = 10.0  # for each doubling of the recompute cost
RUNNING_CREDIT_S = 3600.0
TOOL_CREDIT_S = 600.0  # for a tool that returns at once
TOOL_HALVING_S = 60.0  # an expected wait this long halves the tool's credit
UNKNOWN_TOOL_S = 60.0  # the wait to assume for a tool that nobody has a prediction for
DEAD_DEBIT_S = 1e12  # more than any clock differs: the dead go before all the living

MIN_HEAP_ENTRIES = 64


class SessionState(enum.Enum):
    """What the session whose log ends in a node is doing."""

    RUNNING = "running"
    TOOL_PENDING = "tool pending"
    IDLE = "idle"
    CLOSED = "closed"
    SUPERSEDED = "superseded"


DEAD_STATES = frozenset({SessionState.CLOSED, SessionState.SUPERSEDED})


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
    def state(self) -> SessionState | None: ...
    @property
    def expected_s(self) -> float | None: ...


class Candidate(NodeFacts, Protocol):
    """A node as the queue sees it: the queue alone writes `queued_s`."""

    queued_s: float | None

    @property
    def attached(self) -> bool: ...


def recompute_cost_tokens(node: NodeFacts) -> float:
    """Cost of computing the node again, in tokens at depth 0; deep ones attend to more."""
    middle = node.start + node.num_tokens / 2
    return node.num_tokens * (1 + middle / ATTENTION_KNEE_TOKENS)


def cost_credit_s(node: NodeFacts) -> float:
    """Life that the recompute cost earns; it grows slowly, so that recency decides at last."""
    return COST_CREDIT_S * math.log2(1 + recompute_cost_tokens(node))


def state_credit_s(node: NodeFacts) -> float:
    """Life that the session's state earns: most while it runs, less the longer its tool takes."""
    if node.state is None or node.state is SessionState.IDLE:
        return 0.0
    if node.state in DEAD_STATES:
        return -DEAD_DEBIT_S
    if node.state is SessionState.RUNNING:
        return RUNNING_CREDIT_S
    wait_s = UNKNOWN_TOOL_S if node.expected_s is None else max(0.0, node.expected_s)
    return TOOL_CREDIT_S / (1 + wait_s / TOOL_HALVING_S)


def keep_until_s(node: NodeFacts) -> float:
    """The time at which a leaf is worth nothing; the earliest goes first."""
    return node.last_used_s + state_credit_s(node) + cost_credit_s(node)


def worth_s(node: NodeFacts, now: float) -> float:
    """Seconds of life left at `now`; endless for a node with children, which cannot go."""
    return math.inf if node.num_children else keep_until_s(node) - now


CandidateT = TypeVar("CandidateT", bound=Candidate)


class EvictionQueue(Generic[CandidateT]):
    """Leaves in the order in which they should go: a lazy heap.

    Invariant: each leaf has an entry whose key is `queued_s` and at most its worth. Rising worth
    (a use) touches nothing here and is found when the entry comes up; falling worth must be told
    through `offer`. An entry is void if its key is not the node's `queued_s` or the node is gone.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, CandidateT]] = []
        self._serial = 0
        self._compact_at = MIN_HEAP_ENTRIES

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, node: CandidateT) -> None:
        """Make sure that `node` comes up in time, if it is a leaf; call whenever worth falls."""
        if node.num_children:
            return
        key = keep_until_s(node)
        if node.queued_s is None or key < node.queued_s:
            self._push(key, node)

    def pop(self) -> CandidateT | None:
        """Take out the leaf of least worth; the caller removes it or offers it again."""
        while self._heap:
            queued_s, _, node = heappop(self._heap)
            if node.queued_s != queued_s or not node.attached:
                continue
            node.queued_s = None
            if node.num_children:
                continue
            key = keep_until_s(node)
            if key <= queued_s:
                return node
            self._push(key, node)
        return None

    def check(self, leaves: Iterable[CandidateT]) -> None:
        """Raise CacheCorrupt unless each of `leaves` would come up in time."""
        entries = {(queued_s, id(node)) for queued_s, _, node in self._heap}
        for leaf in leaves:
            if leaf.queued_s is None or (leaf.queued_s, id(leaf)) not in entries:
                raise CacheCorrupt(f"{leaf!r} is a leaf and not in the queue")
            if leaf.queued_s > keep_until_s(leaf):
                raise CacheCorrupt(f"{leaf!r} is worth less than its place in the queue")

    def _push(self, key: float, node: CandidateT) -> None:
        node.queued_s = key
        self._serial += 1  # breaks ties: nodes do not compare
        heappush(self._heap, (key, self._serial, node))
        if len(self._heap) > self._compact_at:
            self._compact()

    def _compact(self) -> None:
        """Drop void entries, which else pile up while nothing is evicted."""
        self._heap = [
            entry for entry in self._heap if entry[2].queued_s == entry[0] and entry[2].attached
        ]
        heapify(self._heap)
        self._compact_at = max(MIN_HEAP_ENTRIES, 2 * len(self._heap))
