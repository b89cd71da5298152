"""What a tier below the host's memory keeps and tells: records, events, counts and errors."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from attrs import field, frozen

from agentrt.cache.keys import Fingerprint
from agentrt.cache.node import TokenArray

Buffer: TypeAlias = Any  # an object of the buffer protocol, contiguous: bytes, array, memoryview


@frozen(kw_only=True, eq=False)
class Record:
    """The KV of one chunk as an index knows it: tokens [start, start + len(token_ids))."""

    key: bytes
    parent: bytes
    token_ids: TokenArray = field(repr=lambda token_ids: f"<{len(token_ids)}>")
    start: int
    num_bytes: int  # of the payload
    last_used_s: float  # wall clock

    @property
    def end(self) -> int:
        """Number of tokens from the root to the end of the chunk."""
        return self.start + len(self.token_ids)

    def holds(self, parent: bytes, token_ids: TokenArray) -> bool:
        """Whether this is the KV of exactly `token_ids` behind `parent`."""
        return self.parent == parent and np.array_equal(self.token_ids, token_ids)


@frozen(kw_only=True)
class TierEvents:
    """What happened since the owner asked last, for the owner's own index."""

    written: tuple[bytes, ...]  # keys that are durable now
    dropped: tuple[bytes, ...]  # keys that are gone and that the owner did not drop itself


@frozen(kw_only=True)
class TierStats:
    """A snapshot; `records` and the bytes are of now, the rest counts from the opening."""

    records: int
    payload_bytes: int
    queued_bytes: int
    written: int
    refused: int
    dropped_corrupt: int
    dropped_orphans: int
    dropped_foreign: int
    evicted: int
    write_errors: int
    rebuilds: int
    read_only: bool


@frozen(kw_only=True)
class LowerStats:
    """A snapshot; bytes are of now, tokens count from the opening."""

    num_chunks: int
    host_bytes: int  # in use
    host_limit_bytes: int
    saved_tokens: int
    unsaved_tokens: int  # that found no room
    host_evicted_tokens: int
    disk: TierStats | None


@frozen(kw_only=True)
class Contents:
    """The records of one fingerprint in a store."""

    fingerprint: Fingerprint
    records: int
    payload_bytes: int
    last_used_s: float


class Gate(Protocol):
    """Where background work waits between small units, while something else has precedence."""

    @property
    def clock(self) -> Callable[[], float]:
        """Of `since_s`."""

    def pass_(self, since_s: float, is_urgent: Callable[[], bool]) -> None:
        """Wait as long as need be: not much beyond `since_s`, when this work could have begun, nor
        once `is_urgent`, which must not lock anything."""

    def look_again(self) -> None:
        """Something may have become urgent. Never waits for long."""


class Tier(Protocol):
    """A store of records that outlives the blocks they were copied from.

    All but `read` is called by the one thread that owns the cache.
    """

    def scan(self) -> list[Record]:
        """All records that can be read, parents before children."""

    def take_over(self) -> bool:
        """Become the one that writes, if this one only reads and the other is gone. If True, what
        `scan` tells has changed."""

    def put(self, record: Record, payload: Sequence[Buffer]) -> bool:
        """Queue a record; False if it is refused now.

        An event follows (written or dropped), unless the owner drops the key first; until then
        the buffers must not change.
        """

    def read(self, record: Record, into: Sequence[Buffer]) -> bool:
        """Fill the buffers with the payload; False, with rubbish in them, on a miss."""

    def prefetch(self, records: Sequence[Record]) -> None:
        """Begin to fetch what `read` will ask for."""

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        """Note a use at `now`."""

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget records; unknown keys are fine."""

    def erase(self, keys: Sequence[bytes]) -> None:
        """Forget records and overwrite their bytes; done when `flush` returns."""

    def events(self) -> TierEvents:
        """What was written or dropped since the last call."""

    def flush(self) -> None:
        """Wait until all that was asked before is durable, or has failed and was counted."""

    def stats(self) -> TierStats:
        """A snapshot of the counts."""

    def close(self) -> None:
        """Flush and let go. Again is fine."""
