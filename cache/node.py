"""A node of the radix tree, and a path through such nodes."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from attrs import define, field, frozen

from agentrt.cache.evict import DEAD_STATES, SessionState

TokenArray = npt.NDArray[np.int32]


@define(eq=False, kw_only=True)
class Node:
    """An edge of the tree with its lower end: tokens [start, end) of a path and their blocks."""

    namespace: str
    parent: "Node | None" = field(repr=False)  # None in a root, and once the node is gone
    tokens: TokenArray = field(repr=False)
    start: int
    blocks: list[int]  # of block index start // block_tokens and on
    last_used_s: float
    children: dict[int, "Node"] = field(factory=dict, repr=lambda children: str(len(children)))
    num_hits: int = 0
    is_below: bool = False  # whether the tier below holds it too
    state: SessionState | None = None  # of the session whose log ends here, if one is known
    marked_s: float = 0.0  # when that was noted
    expected_s: float | None = None  # how long after that the session's next turn is due
    queued: int = 0  # serial number in the eviction queue

    @property
    def num_tokens(self) -> int:
        """Length of the edge."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Number of tokens from the root to the lower end."""
        return self.start + len(self.tokens)

    @property
    def num_children(self) -> int:
        """How many edges go on from here."""
        return len(self.children)

    @property
    def attached(self) -> bool:
        """Whether the node is in the tree; false for a root."""
        return self.parent is not None

    def use(self, now: float) -> None:
        """Note a use at `now`; one that was given up as dead is not, then."""
        self.last_used_s = max(self.last_used_s, now)
        if self.state in DEAD_STATES:
            self.state = None

    def hit(self, now: float) -> None:
        """Note a use that found this here: it spared a request the computing of it."""
        self.use(now)
        self.num_hits += 1

    def path(self) -> list["Node"]:
        """The nodes from below the root down to this one."""
        path = [self]
        while (parent := path[-1].parent) is not None and parent.attached:
            path.append(parent)
        return path[::-1]

    def covered_above(self, block: int, begin: int) -> int:
        """How many tokens of a block, whose first is token `begin` of the path, are before the end
        of the nearest ancestor that holds it."""
        # All holders of a block lie on one path, though not always next to each other.
        ancestor = self.parent
        while ancestor is not None and ancestor.end > begin:
            if ancestor.blocks[-1] == block:
                return ancestor.end - begin
            ancestor = ancestor.parent
        return 0

    def chain_above(self) -> Iterator["Node"]:
        """Ancestors that lead to this node only, the nearest first."""
        ancestor = self.parent
        while ancestor is not None and ancestor.attached and len(ancestor.children) == 1:
            yield ancestor
            ancestor = ancestor.parent


@frozen(kw_only=True, eq=False)
class Evicted:
    """Tokens [start, len(token_ids)) of a path that must make room on the device.

    Block i of `block_ids` has tokens [i * block_tokens, ...) of the path, and still has them until
    the device is next written to. `leaf` is what they are the end of, as it was before.
    """

    token_ids: TokenArray
    start: int
    block_ids: list[int]
    leaf: Node


@frozen
class Match:
    """The longest prefix found: the nodes it runs through; it may end inside the last one."""

    path: list[Node]
    num_tokens: int

    @property
    def is_inside(self) -> bool:
        """Whether it ends before the end of its last node."""
        return bool(self.path) and self.num_tokens < self.path[-1].end


def num_common(left: TokenArray, right: TokenArray) -> int:
    """Length of the common prefix."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size
