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
from agentrt.cache.keys import TOKEN_BYTES, raw_tokens
from agentrt.cache.node import TokenArray, num_common
from agentrt.cache.tier import Record
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
    raw: bytes = field(repr=False)  # its tokens as `raw_tokens` gives them
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
    children: "dict[bytes, Chunk]" = field(
        factory=dict, repr=lambda children: str(len(children))
    )  # by their raw tokens

    @property
    def end(self) -> int:
        """Number of tokens from the root to the end of the chunk."""
        return self.start + len(self.token_ids)

    @property
    def is_readable(self) -> bool:
        """Whether some tier has its bytes."""
        host, disk = self.host, self.disk
        return (host is not None and host.is_ready) or (disk is not None and disk.is_ready)

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

    Invariant: `_by_key` holds every chunk of the tree under its key. Keys are hashes, so no path is
    found by them: a chunk is found by its tokens, below its parent, and a second path with the same
    key is not taken in. A lookup of 64 tokens takes 0.2 us: Python's own hash, and a comparison.
    """

    def __init__(
        self, root_key: bytes, chunk_tokens: int, digest: Digest = xxh3_128_digest
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self._digest = digest
        empty = np.empty(0, np.int32)
        self.root = Chunk(
            key=root_key, parent=None, raw=b"", token_ids=empty, start=0, last_used_s=0.0
        )
        self._by_key: dict[bytes, Chunk] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._by_key.values())

    def get(self, key: bytes) -> Chunk | None:
        return self._by_key.get(key)

    def pieces(self, token_ids: TokenArray) -> Iterator[tuple[int, bytes]]:
        """A log cut into chunks: where each starts, and its raw tokens."""
        raw, num_bytes = raw_tokens(token_ids), TOKEN_BYTES * self.chunk_tokens
        for begin in range(0, len(raw), num_bytes):
            yield begin // TOKEN_BYTES, raw[begin : begin + num_bytes]

    def match(self, token_ids: TokenArray, have_tokens: int = 0) -> StoredPrefix:
        """The longest prefix of `token_ids` all of whose chunks are readable, but for those that
        lie in the first `have_tokens`, which the caller has."""
        chunks: list[Chunk] = []
        node, position = self.root, 0
        last_known = have_tokens - self.chunk_tokens  # the start of the last chunk that it has
        for start, piece in self.pieces(token_ids):
            best, num_bytes = node.children.get(piece), len(piece)
            if start > last_known:
                best, num_bytes = self._best_child(node, piece, best)
            if best is None:
                break
            chunks.append(best)
            position = start + num_bytes // TOKEN_BYTES
            if num_bytes < TOKEN_BYTES * self.chunk_tokens:
                break
            node = best
        return StoredPrefix(tuple(chunks), position)

    def _best_child(
        self, node: Chunk, piece: bytes, whole: Chunk | None
    ) -> tuple[Chunk | None, int]:
        """The readable child that has most of `piece` at its beginning, and how many bytes of it;
        `whole` is the one that has no more and no less."""
        if whole is not None and whole.is_readable:
            return whole, len(piece)
        best, longest, first = None, 0, piece[:TOKEN_BYTES]
        token_ids = np.frombuffer(piece, np.int32)
        for raw, child in node.children.items():
            if raw[:TOKEN_BYTES] == first and child.is_readable:
                num_tokens = num_common(child.token_ids, token_ids)
                if num_tokens > longest:
                    best, longest = child, num_tokens
        return best, longest * TOKEN_BYTES

    def known(self, token_ids: TokenArray) -> list[Chunk]:
        """The chunks of this log that the index has, from the first on, readable or not."""
        chunks, node = [], self.root
        for _, piece in self.pieces(token_ids):
            child = node.children.get(piece)
            if child is None:
                break
            chunks.append(child)
            node = child
        return chunks

    def file(self, record: Record, now: float) -> Chunk | None:
        """The chunk of a record, if need be a new one; None where the chunk before it is not here,
        or its key is another's."""
        is_first = record.parent == self.root.key
        parent = self.root if is_first else self._by_key.get(record.parent)
        if parent is None or parent.end != record.start:
            return None
        raw = raw_tokens(record.token_ids)
        return parent.children.get(raw) or self.add(parent, raw, now)

    def add(self, parent: Chunk, raw: bytes, now: float) -> Chunk | None:
        """A new chunk behind `parent`, of these raw tokens; None where its key is another chunk's
        (a collision)."""
        key = self._digest(parent.key + raw)
        if key in self._by_key or key == self.root.key:
            return None
        chunk = Chunk(
            key=key,
            parent=parent,
            raw=raw,
            token_ids=np.frombuffer(raw, np.int32),
            start=parent.end,
            last_used_s=now,
        )
        parent.children[raw] = chunk
        self._by_key[key] = chunk
        return chunk

    def covers(self, parent: Chunk, tail: bytes) -> bool:
        """Whether a longer readable chunk begins with this tail."""
        if len(tail) == TOKEN_BYTES * self.chunk_tokens:
            return False
        return any(
            len(raw) > len(tail) and raw.startswith(tail) and child.is_readable
            for raw, child in parent.children.items()
        )

    def tails_of(self, chunk: Chunk) -> list[Chunk]:
        """The tails of which `chunk` is the continuation."""
        assert chunk.parent is not None
        return [
            other
            for raw, other in chunk.parent.children.items()
            if len(raw) < len(chunk.raw) and chunk.raw.startswith(raw)
        ]

    def deepest(self, token_ids: TokenArray) -> Chunk:
        """The last chunk of this log that the index knows, readable or not."""
        node = self.root
        for _, piece in self.pieces(token_ids):
            child = node.children.get(piece)
            if child is None:
                tails = [other for raw, other in node.children.items() if piece.startswith(raw)]
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
            del parent.children[node.raw]
            del self._by_key[node.key]
            node = parent

    def check(self) -> None:
        """Raise CacheCorrupt unless the tree is well formed; for tests, it reads all."""
        waiting, num_seen = [self.root], 0
        while waiting:
            node = waiting.pop()
            for raw, child in node.children.items():
                if child.parent is not node or child.start != node.end:
                    raise CacheCorrupt(f"{child!r} does not join its parent {node!r}")
                if child.raw != raw or raw_tokens(child.token_ids) != raw:
                    raise CacheCorrupt(f"{child!r} is filed under other tokens")
                if self._by_key.get(child.key) is not child:
                    raise CacheCorrupt(f"{child!r} is filed under another key")
                if child.children and len(child.token_ids) != self.chunk_tokens:
                    raise CacheCorrupt(f"{child!r} is a tail with children")
                if not (child.host or child.disk or child.children or child.num_pins):
                    raise CacheCorrupt(f"{child!r} is held by nothing")
                for tier in ("host", "disk"):
                    _check_holding(child, tier)
            num_seen += len(node.children)
            waiting += node.children.values()
        if num_seen != len(self._by_key):
            raise CacheCorrupt(f"{num_seen} chunks in the tree, {len(self._by_key)} keys")


def _check_holding(chunk: Chunk, tier: str) -> None:
    holding: Holding | None = getattr(chunk, tier)
    if holding is None:
        return
    num_children = sum(getattr(child, tier) is not None for child in chunk.children.values())
    if holding.chunk is not chunk or not holding.attached or holding.num_children != num_children:
        raise CacheCorrupt(f"{chunk!r}: the books of its {tier} copy are wrong: {holding!r}")
