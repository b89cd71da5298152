"""Chunks: the unit in which KV lies below the device, and the index that finds them by content.

A sequence is cut at multiples of `chunk_tokens`; the last chunk of a log may be shorter (a tail).
A chunk hangs below the one before it, so that equal tokens behind different beginnings differ.
"""

from collections.abc import Callable, Iterator
from typing import final

import numpy as np
from attrs import define, field, frozen
from xxhash import xxh3_128_digest

from agentrt.cache.evict import NodeFacts, SessionState
from agentrt.cache.keys import chunk_key
from agentrt.cache.node import TokenArray, num_common
from agentrt.errors import CacheCorrupt

Digest = Callable[[bytes], bytes]


@define(eq=False)
class Holding:
    """One tier's copy of a chunk, as the eviction queue of that tier sees it."""

    chunk: "Chunk" = field(repr=False)
    slot: int = -1  # in the host tier
    is_ready: bool = False  # its bytes are there
    num_children: int = 0  # chunks behind it that the same tier holds
    attached: bool = True
    queued: int = 0
    is_below: bool = False  # whether the tier below holds it too

    @property
    def start(self) -> int:
        return self.chunk.start

    @property
    def num_tokens(self) -> int:
        return len(self.chunk.token_ids)

    @property
    def last_used_s(self) -> float:
        return self.chunk.last_used_s

    @property
    def num_hits(self) -> int:
        return self.chunk.num_hits

    @property
    def state(self) -> SessionState | None:
        return self.chunk.state

    @state.setter
    def state(self, state: SessionState | None) -> None:
        self.chunk.state = state

    @property
    def marked_s(self) -> float:
        return self.chunk.marked_s

    @marked_s.setter
    def marked_s(self, now: float) -> None:
        self.chunk.marked_s = now

    @property
    def expected_s(self) -> float | None:
        return self.chunk.expected_s

    @expected_s.setter
    def expected_s(self, seconds: float | None) -> None:
        self.chunk.expected_s = seconds


@define(eq=False, kw_only=True)
class Chunk:
    """Tokens [start, end) of a path, and which tiers hold their KV.

    A chunk that no tier holds stays only while others hang below it. `num_pins` counts transfers
    that read or write its bytes in the host tier: these stay where they are meanwhile.
    """

    key: bytes
    parent: "Chunk | None" = field(repr=False)  # None in the root
    token_ids: TokenArray = field(repr=lambda token_ids: f"<{len(token_ids)}>")
    start: int
    last_used_s: float
    num_hits: int = 0
    state: SessionState | None = None  # of the session whose log ends here
    marked_s: float = 0.0
    expected_s: float | None = None
    host: Holding | None = None
    disk: Holding | None = None
    num_pins: int = 0
    children: "list[Chunk]" = field(factory=list, repr=lambda children: str(len(children)))

    @property
    def end(self) -> int:
        """Number of tokens from the root to the end of the chunk."""
        return self.start + len(self.token_ids)

    @property
    def is_readable(self) -> bool:
        """Whether some tier has its bytes."""
        return any(h is not None and h.is_ready for h in (self.host, self.disk))

    def take_facts(self, leaf: NodeFacts) -> None:
        """What the device's eviction knew of the log that ends here."""
        self.state, self.marked_s, self.expected_s = leaf.state, leaf.marked_s, leaf.expected_s
        self.num_hits = max(self.num_hits, leaf.num_hits)


@frozen
class StoredPrefix:
    """The longest prefix that the lower tiers hold; the last chunk may be matched in part."""

    chunks: tuple[Chunk, ...]
    num_tokens: int


@final
class ChunkIndex:
    """All chunks of one fingerprint, in a tree below `root_key`.

    Invariant: `_by_key` holds every chunk of the tree under its key. Keys are hashes: what is
    found by one is compared with the tokens asked for, and a second path with the same key is not
    taken in.
    """

    def __init__(
        self, root_key: bytes, chunk_tokens: int, digest: Digest = xxh3_128_digest
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self._digest = digest
        empty = np.empty(0, np.int32)
        self.root = Chunk(key=root_key, parent=None, token_ids=empty, start=0, last_used_s=0.0)
        self._by_key: dict[bytes, Chunk] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._by_key.values())

    def get(self, key: bytes) -> Chunk | None:
        return self._by_key.get(key)

    def match(self, token_ids: TokenArray, have_tokens: int = 0) -> StoredPrefix:
        """The longest prefix of `token_ids` all of whose chunks are readable, but for those that
        lie in the first `have_tokens`, which the caller has."""
        chunks: list[Chunk] = []
        node, position = self.root, 0
        while position < len(token_ids):
            rest = token_ids[position : position + self.chunk_tokens]
            if position + self.chunk_tokens <= have_tokens:
                best, num_tokens = self.find(node, rest), len(rest)
            else:
                best, num_tokens = self._best_child(node, rest)
            if best is None:
                break
            chunks.append(best)
            position += num_tokens
            if num_tokens < self.chunk_tokens:
                break
            node = best
        return StoredPrefix(tuple(chunks), position)

    def _best_child(self, node: Chunk, rest: TokenArray) -> tuple[Chunk | None, int]:
        whole = self.find(node, rest) if len(rest) == self.chunk_tokens else None
        if whole is not None and whole.is_readable:
            return whole, len(rest)
        best, longest = None, 0
        for child in node.children:
            if child.is_readable and child.token_ids[0] == rest[0]:
                num_tokens = num_common(child.token_ids, rest)
                if num_tokens > longest:
                    best, longest = child, num_tokens
        return best, longest

    def find(self, parent: Chunk, token_ids: TokenArray) -> Chunk | None:
        """The chunk of exactly these tokens behind `parent`, whether readable or not."""
        chunk = self._by_key.get(chunk_key(parent.key, token_ids, self._digest))
        if chunk is None or chunk.parent is not parent:
            return None
        return chunk if np.array_equal(chunk.token_ids, token_ids) else None

    def add(self, parent: Chunk, token_ids: TokenArray, now: float) -> Chunk | None:
        """A new chunk behind `parent`; None where its key is another chunk's (a collision)."""
        key = chunk_key(parent.key, token_ids, self._digest)
        if key in self._by_key or key == self.root.key:
            return None
        chunk = Chunk(
            key=key,
            parent=parent,
            token_ids=token_ids.copy(),
            start=parent.end,
            last_used_s=now,
        )
        parent.children.append(chunk)
        self._by_key[key] = chunk
        return chunk

    def covers(self, parent: Chunk, tail: TokenArray) -> bool:
        """Whether a longer readable chunk begins with this tail."""
        if len(tail) == self.chunk_tokens:
            return False
        return any(
            child.is_readable and len(child.token_ids) > len(tail) and begins(child.token_ids, tail)
            for child in parent.children
        )

    def tails_of(self, chunk: Chunk) -> list[Chunk]:
        """The tails of which `chunk` is the continuation."""
        assert chunk.parent is not None
        return [
            other
            for other in chunk.parent.children
            if len(other.token_ids) < len(chunk.token_ids)
            and begins(chunk.token_ids, other.token_ids)
        ]

    def deepest(self, token_ids: TokenArray) -> Chunk:
        """The last chunk of this log that the index knows, readable or not."""
        node = self.root
        for start in range(0, len(token_ids), self.chunk_tokens):
            tokens = token_ids[start : start + self.chunk_tokens]
            child = self.find(node, tokens)
            if child is None:
                tails = [other for other in node.children if begins(tokens, other.token_ids)]
                return max(tails, key=lambda other: other.end, default=node)
            node = child
        return node

    def prune(self, chunk: Chunk) -> None:
        """Forget a chunk that nothing holds or hangs on, and its ancestors likewise."""
        node: Chunk | None = chunk
        while node is not None and node.parent is not None:
            if node.children or node.host or node.disk or node.num_pins:
                return
            parent = node.parent
            parent.children.remove(node)
            del self._by_key[node.key]
            node = parent

    def check(self) -> None:
        """Raise CacheCorrupt unless the tree is well formed; for tests, it reads all."""
        waiting, num_seen = [self.root], 0
        while waiting:
            node = waiting.pop()
            for child in node.children:
                if child.parent is not node or child.start != node.end:
                    raise CacheCorrupt(f"{child!r} does not join its parent {node!r}")
                if self._by_key.get(child.key) is not child:
                    raise CacheCorrupt(f"{child!r} is filed under another key")
                if child.children and len(child.token_ids) != self.chunk_tokens:
                    raise CacheCorrupt(f"{child!r} is a tail with children")
                if not (child.host or child.disk or child.children or child.num_pins):
                    raise CacheCorrupt(f"{child!r} is held by nothing")
                for tier in ("host", "disk"):
                    _check_holding(child, tier)
            num_seen += len(node.children)
            waiting += node.children
        if num_seen != len(self._by_key):
            raise CacheCorrupt(f"{num_seen} chunks in the tree, {len(self._by_key)} keys")


def _check_holding(chunk: Chunk, tier: str) -> None:
    holding: Holding | None = getattr(chunk, tier)
    if holding is None:
        return
    num_children = sum(getattr(child, tier) is not None for child in chunk.children)
    if holding.chunk is not chunk or not holding.attached or holding.num_children != num_children:
        raise CacheCorrupt(f"{chunk!r}: the books of its {tier} copy are wrong: {holding!r}")


def begins(longer: TokenArray, shorter: TokenArray) -> bool:
    """Whether `longer` begins with `shorter`."""
    return num_common(longer, shorter) == len(shorter)
