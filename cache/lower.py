"""The tiers below the device: what is saved into host RAM and on disk, found again, and let go."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, final

from agentrt.cache.chunk import Chunk, ChunkIndex, Holding, StoredPrefix
from agentrt.cache.evict import DEAD_STATES, SessionState, TierRates, worth
from agentrt.cache.holdings import Holdings
from agentrt.cache.host import HostTier
from agentrt.cache.node import Evicted, TokenArray
from agentrt.cache.tier import LowerStats, Record, Tier

TAKE_OVER_APART_S = 2.0  # between two looks whether the writer of the disk tier is gone


@final
class LowerTiers:
    """Host tier and disk tier behind one index of chunks. Owned by one thread.

    A chunk is saved to the host tier first (`begin_save`, the caller copies, `end_save`), which
    queues it for the disk. `keeps_host=False` makes the host tier a mere way station.

    Invariant: a chunk in transfer is pinned, and what is pinned in the host tier is not evicted;
    `_writing` holds the chunks pinned for the disk's writer, each once.
    """

    def __init__(
        self,
        index: ChunkIndex,
        host: HostTier,
        disk: Tier | None,
        *,
        token_bytes: int,
        keeps_host: bool,
        clock: Callable[[], float],  # of `now`
        wall_clock: Callable[[], float],  # of records
        host_rates: TierRates | None = None,
        disk_rates: TierRates | None = None,
    ) -> None:
        self.token_bytes = token_bytes
        self.is_behind = False  # whether `poll` has more to do at once
        self._index = index
        self._host = host
        self._disk = disk
        self._keeps_host = keeps_host
        self._wall_ahead_s = wall_clock() - clock()
        self._holdings = Holdings(index, host, host_rates, disk_rates)
        self._writing: dict[bytes, Chunk] = {}
        self._to_write: dict[bytes, Chunk] = {}  # refused by the disk so far
        self._clock = clock
        self._now = clock()  # the newest time that a caller told
        self._next_take_over_s = self._now
        self._saved_tokens = 0
        self._unsaved_tokens = 0
        if disk is not None:
            self._take_in(disk.scan())

    def __repr__(self) -> str:
        return f"<LowerTiers {len(self._index)} chunks, {self._host!r}, {self._disk!r}>"

    @property
    def chunk_tokens(self) -> int:
        return self._index.chunk_tokens

    @property
    def version(self) -> int:
        """Another one whenever what can be read may be."""
        return self._holdings.version

    # ---- reading

    def match(self, token_ids: TokenArray, have_tokens: int = 0) -> StoredPrefix:
        """The longest prefix that is stored, or on the device, which has the first `have_tokens`;
        changes nothing."""
        return self._index.match(token_ids, have_tokens)

    def pin(self, chunks: Iterable[Chunk]) -> None:
        """Keep the bytes of these where they are until `unpin`."""
        for chunk in chunks:
            chunk.num_pins += 1

    def unpin(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.num_pins -= 1
            self._settle(chunk)

    def hit(self, prefix: StoredPrefix, now: float) -> None:
        """Note that a request read this prefix."""
        self._now = now
        for chunk in prefix.chunks:
            chunk.last_used_s = max(chunk.last_used_s, now)
            chunk.num_hits += 1
        if self._disk is not None:
            held = [chunk.key for chunk in prefix.chunks if chunk.disk is not None]
            self._disk.touch(held, now + self._wall_ahead_s)

    def slot_view(self, chunk: Chunk) -> Any:
        """The chunk's bytes in the host tier."""
        assert chunk.host is not None
        return self._host.view(chunk.host.slot, len(chunk.token_ids) * self.token_bytes)

    def record(self, chunk: Chunk) -> Record:
        """The chunk as the disk tier knows it."""
        assert chunk.parent is not None
        return Record(
            key=chunk.key,
            parent=chunk.parent.key,
            token_ids=chunk.token_ids,
            start=chunk.start,
            num_bytes=len(chunk.token_ids) * self.token_bytes,
            last_used_s=chunk.last_used_s + self._wall_ahead_s,
        )

    # ---- writing

    def begin_save(
        self,
        token_ids: TokenArray,
        now: float,
        *,
        behind: Chunk | None = None,
        most_chunks: int | None = None,
    ) -> list[Chunk]:
        """Chunks of this log that no tier holds, pinned, each with a slot to copy its bytes to: the
        first `most_chunks` of those behind a chunk of it that was got so, which is still pinned.

        Evicts what is worth least from the host tier; ends early where there is no room.
        """
        self._now = now
        path: list[Chunk] = []
        fresh: list[Chunk] = []
        node = self._index.root if behind is None else behind
        for _, piece in self._index.pieces(token_ids[node.end :]):
            chunk, is_enough = node.children.get(piece), len(fresh) == most_chunks
            if is_enough or (chunk is None and self._index.covers(node, piece)):
                break
            chunk = chunk or self._index.add(node, piece, now)
            if chunk is None:
                break
            chunk.last_used_s = max(chunk.last_used_s, now)
            chunk.num_pins += 1
            is_held = chunk.host is not None or chunk.disk is not None
            slot = None if is_held else self._holdings.reserve_slot(now)
            (path if slot is None else fresh).append(chunk)
            if slot is not None:
                self._holdings.hold(chunk, "host", slot, in_queue=False)
            elif not is_held:
                self._unsaved_tokens += len(token_ids) - chunk.start
                break
            node = chunk
        for chunk in fresh:  # all but the last have one behind them: that one alone may go
            self._holdings.offer(chunk)
        self.unpin(path)
        return fresh

    def end_save(self, chunks: Sequence[Chunk], *, copied: bool) -> None:
        """Take what was copied in, or give the slots back."""
        for chunk in chunks:
            assert chunk.host is not None
            chunk.num_pins -= 1
            if not copied:
                self._holdings.let_go(chunk, "host")
                continue
            self._holdings.ready(chunk.host)
            self._saved_tokens += len(chunk.token_ids)
            self._drop_tails(chunk)
            if self._disk is not None:
                self._to_write[chunk.key] = chunk
        self.is_behind = bool(self._to_write)

    def take_evicted(self, evicted: Evicted, now: float) -> list[Chunk]:
        """Hold what the device lets go of, unless all that is here is worth more.

        The caller copies the chunks' bytes before it reads or writes any others: from here on they
        count as being there. What stands behind something that finds no room goes with it.
        """
        self._now = now
        incoming = worth(evicted.leaf, now, self._holdings.host_rates)
        path: list[Chunk] = []
        fresh: list[Chunk] = []
        node = self._index.root
        for start, piece in self._index.pieces(evicted.token_ids):
            chunk = node.children.get(piece) or self._index.add(node, piece, now)
            if chunk is None:
                break
            chunk.num_pins += 1
            path.append(chunk)
            if chunk.end > evicted.start and chunk.host is None:
                slot = self._holdings.reserve_slot(now, incoming)
                if slot is None:
                    self._unsaved_tokens += evicted.leaf.end - max(start, evicted.start)
                    self._holdings.let_go_below(chunk)
                    break
                self._holdings.ready(self._holdings.hold(chunk, "host", slot))
                fresh.append(chunk)
            node = chunk
        if path and path[-1].end == len(evicted.token_ids):
            path[-1].take_facts(evicted.leaf)
            self._holdings.offer(path[-1])
        for chunk in fresh:
            self._saved_tokens += len(chunk.token_ids)
            chunk.last_used_s = max(chunk.last_used_s, evicted.leaf.last_used_s)
            self._drop_tails(chunk)
        self.unpin(path)
        return fresh

    def promoted(self, token_ids: TokenArray) -> None:
        """Let go of what the device has again: it comes back when the device lets go of it."""
        for chunk in self._index.known(token_ids):
            if not chunk.num_pins:
                self._holdings.let_go(chunk, "host")

    def poll(self, most_writes: int | None = None) -> None:
        """Hear what the disk tier did, and offer it what it has not got: `most_writes` chunks at
        most, after which the tiers are `is_behind` if more could be offered."""
        if self._disk is None:
            return
        if self._clock() >= self._next_take_over_s:
            self._try_take_over(self._disk)
        events = self._disk.events()
        for key in events.written:
            self._written(key)
        for key in events.dropped:
            self._dropped(key)
        offered = list(islice(self._to_write.values(), most_writes))
        self.is_behind = all(self._write(chunk) for chunk in offered) and bool(self._to_write)

    def victims(self, num_bytes: int) -> list[bytes]:
        """What the disk tier should evict to free `num_bytes`: called from within its `put`."""
        keys: list[bytes] = []
        needed: list[Holding] = []
        for holding in self._holdings.disk_victims(self._now):
            if any(child.key in self._writing for child in holding.chunk.children.values()):
                needed.append(holding)  # what is being put goes on from here
                continue
            num_bytes -= holding.num_tokens * self.token_bytes
            keys.append(holding.chunk.key)
            self._holdings.let_go(holding.chunk, "disk")
            if num_bytes <= 0:
                break
        for holding in needed:
            self._holdings.offer(holding.chunk)
        return keys

    # ---- letting go

    def mark(
        self, token_ids: TokenArray, state: SessionState, now: float, expected_s: float | None
    ) -> None:
        """Tell eviction what the session whose log is `token_ids` does."""
        last = self._index.deepest(token_ids)
        if last.parent is None or (last.children and last.end < len(token_ids)):
            return
        if state in DEAD_STATES and last.children:
            return  # others go on from here
        last.state, last.marked_s, last.expected_s = state, now, expected_s
        self._holdings.offer(last)

    def forget(self, token_ids: TokenArray, keep_tokens: int, *, erase: bool) -> None:
        """Drop this log's own chunks beyond `keep_tokens`; with `erase` their bytes are overwritten
        (on disk once the tier was flushed). What other logs share stays."""
        chunk = self._index.deepest(token_ids)
        keys: list[bytes] = []
        while chunk.parent is not None and not chunk.children:
            if chunk.end <= keep_tokens or chunk.num_pins > (chunk.key in self._writing):
                break  # what another request moves right now is not this log's own
            parent = chunk.parent
            if erase and chunk.host is not None:
                self._host.wipe(chunk.host.slot)
            keys.append(chunk.key)
            self._discard(chunk)
            chunk = parent
        if self._disk is not None and keys:
            (self._disk.erase if erase else self._disk.drop)(keys)

    @property
    def wants_poll(self) -> bool:
        """Whether the disk tier should soon be asked again."""
        return bool(self._to_write)

    def wait_until_erased(self) -> None:
        """Wait for the disk tier; any thread may."""
        if self._disk is not None:
            self._disk.flush()

    def flush(self) -> None:
        """Wait until the disk tier has all that it will take."""
        if self._disk is None:
            return
        num_left = -1
        while num_left != len(self._to_write):
            num_left = len(self._to_write)
            self._disk.flush()
            self.poll()

    def close(self) -> None:
        """Write what is left, and let go of the disk tier."""
        self.flush()
        if self._disk is not None:
            self._disk.close()

    def stats(self) -> LowerStats:
        return LowerStats(
            num_chunks=len(self._index),
            host_bytes=self._host.used_bytes,
            host_limit_bytes=self._host.num_slots * self._host.slot_bytes,
            saved_tokens=self._saved_tokens,
            unsaved_tokens=self._unsaved_tokens,
            host_evicted_tokens=self._holdings.host_evicted_tokens,
            disk=None if self._disk is None else self._disk.stats(),
        )

    def check(self) -> None:
        """Raise CacheCorrupt unless index, slots and queues agree; for tests, it reads all."""
        self._index.check()
        self._host.check()
        self._holdings.check()

    # ---- inside

    def _try_take_over(self, disk: Tier) -> None:
        """Write the disk tier, if whoever did so is gone."""
        self._next_take_over_s = self._clock() + TAKE_OVER_APART_S
        if not disk.take_over():
            return
        records = disk.scan()
        there = {record.key for record in records}
        for chunk in [each for each in self._index if each.disk is not None]:
            if chunk.key not in there:
                self._holdings.let_go(chunk, "disk")
        self._take_in(records)

    def _take_in(self, records: Iterable[Record]) -> None:
        for record in records:
            chunk = self._index.file(record, record.last_used_s - self._wall_ahead_s)
            if chunk is None:
                continue
            if chunk.key == record.key and chunk.disk is None:
                self._holdings.ready(self._holdings.hold(chunk, "disk"))
            self._index.prune(chunk)

    def _drop_tails(self, chunk: Chunk) -> None:
        """Drop the tails of which `chunk` is the continuation."""
        keys = []
        for tail in self._index.tails_of(chunk):
            if not tail.num_pins:
                keys.append(tail.key)
                self._discard(tail)
        if keys and self._disk is not None:
            self._disk.drop(keys)

    def _discard(self, chunk: Chunk) -> None:
        """Take a chunk out of the books of all tiers; the caller tells the disk tier."""
        if self._writing.pop(chunk.key, None) is not None:
            chunk.num_pins -= 1
        self._holdings.let_go(chunk, "disk")
        self._holdings.let_go(chunk, "host")

    def _settle(self, chunk: Chunk) -> None:
        """After a pin is gone: free a way station, and forget what nothing holds any more."""
        if chunk.num_pins:
            return
        is_safe = chunk.disk is not None and chunk.disk.is_ready
        if chunk.host is not None and not self._keeps_host and is_safe:
            self._holdings.let_go(chunk, "host")
        self._index.prune(chunk)

    def _write(self, chunk: Chunk) -> bool:
        assert self._disk is not None
        if chunk.disk is not None or chunk.host is None:
            del self._to_write[chunk.key]
            return True
        self._writing[chunk.key] = chunk
        chunk.num_pins += 1
        if not self._disk.put(self.record(chunk), [self.slot_view(chunk)]):
            del self._writing[chunk.key]
            chunk.num_pins -= 1
            return False
        del self._to_write[chunk.key]
        self._holdings.hold(chunk, "disk")
        return True

    def _written(self, key: bytes) -> None:
        chunk = self._writing.pop(key, None)
        if chunk is not None:
            if chunk.disk is not None:
                self._holdings.ready(chunk.disk)
            self.unpin([chunk])

    def _dropped(self, key: bytes) -> None:
        written = self._writing.pop(key, None)
        chunk = self._index.get(key) if written is None else written
        if chunk is None:
            return
        if written is not None:
            chunk.num_pins -= 1
        self._holdings.let_go(chunk, "disk")
        self._settle(chunk)
