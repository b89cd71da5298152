"""The disk tier: KV of chunks that survives the process, under a hard quota.

Three files in a folder of mode 0700. `payload.kv` has the records, header and payload, in extents
of whole grains; `index.lmdb` has the headers alone and where their extents are, so that opening
reads no payload; `index.digest` vouches for the index. A damaged or half-written file is never
worse than a miss: a read compares the header, byte for byte, and the payload's checksum, and the
index is made anew from the headers in the payload file whenever it cannot be proved whole.

Payloads as LMDB values were measured against this (benchmarks/disk_tier.py; records of 2.9 MB on a
virtual disk, MB/s): written with a sync each 32 MiB at 300 to 410 against 780 to 1,470, read cold
at 1,100 against 1,290 (710 without `prefetch`), from the page cache at 5,500 and more against
3,200. A full store that is churned through is payload by 93 % against 99 %. Of openings with one
flipped bit in the tree 1.8 % gave wrong or missing values, 0.2 % a crash, and a tree among 50 GB of
payloads cannot be digested at each opening. Nor can an erased value be overwritten, but by a copy
of the environment. Reads from the page cache are the price: at 3 GB/s they are no one's bottleneck.

One process writes (it holds a lock on `lock`, which dies with it), others read what was there when
they opened; a reader that comes too late finds another header, which is a miss.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, final

import numpy as np
from attrs import evolve

from agentrt.cache.disk_folder import OpenFolder, file_bytes, is_being_written, open_folder
from agentrt.cache.disk_table import Entry
from agentrt.cache.disk_writer import MIN_QUOTA_BYTES, DiskWriter, WriteOptions
from agentrt.cache.keys import Fingerprint
from agentrt.cache.packing import Int8Packing
from agentrt.cache.payload_file import GRAIN_BYTES, checksum_of
from agentrt.cache.tier import Buffer, Contents, Gate, Record, TierEvents, TierStats
from agentrt.errors import CacheCorrupt, TierUnavailable

Victims = Callable[[int], Sequence[bytes]]  # bytes wanted -> keys to evict, leaves first


@final
class DiskTier:
    """Records of one fingerprint in a folder that may hold those of others too.

    The owner's thread calls everything but `read`, which any thread may call. State: the table,
    under the lock `_changed`; the files, which the writer's thread alone writes. Invariant: what
    the table says is written has its payload on disk; see `check`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        quota_bytes: int,
        fingerprint: Fingerprint,
        clock: Callable[[], float],
        victims: Victims | None = None,
        options: WriteOptions | None = None,
        packing: Int8Packing | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Open or create the tier in `folder`; read-only if another tier writes there. `packing` is
        how own payloads lie in the file; it must be part of the fingerprint. The writer's thread
        passes the `gate`, if there is one, before each record.

        `victims`, called in `put` only, names what the owner can spare; without it the least
        recently used leaf goes. Raises TierUnavailable, and ValueError for too small a quota.
        """
        if quota_bytes < MIN_QUOTA_BYTES:
            raise ValueError(f"{quota_bytes=} must be at least {MIN_QUOTA_BYTES}")
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._fingerprint = fingerprint.encode()
        self._clock = clock
        self._victims = victims
        self._options = options or WriteOptions()
        self._packing = packing
        self._gate = gate
        self._changed = threading.Condition()
        self._closed = False
        self._start(self._open())

    def _open(self) -> OpenFolder:
        return open_folder(
            self._folder,
            quota_bytes=self._quota_bytes,
            fingerprint=self._fingerprint,
            own_lru=self._victims is None,
        )

    def _start(self, opened: OpenFolder) -> None:
        self._opened = opened
        self._table = opened.table
        self._writer: DiskWriter | None = None  # in a reader of a folder that another one writes
        if opened.index is not None:
            self._writer = DiskWriter(
                changed=self._changed,
                table=opened.table,
                payload=opened.payload,
                index=opened.index,
                quota_bytes=self._quota_bytes,
                options=self._options,
                clock=self._clock,
                packing=self._packing,
                gate=self._gate,
            )
            self._writer.start()

    def take_over(self) -> bool:
        """Become the folder's writer if the other one is gone; then `scan` again.

        False, and nothing has changed, if it is there, if this one writes already, or if the folder
        cannot be written now.
        """
        if self._closed or self._writer is not None:
            return False
        try:
            if is_being_written(self._folder):
                return False
            opened = self._open()
        except (OSError, TierUnavailable):
            return False  # what it was opened with is still good to read from
        if opened.lock is None:
            opened.close()
            return False
        with self._changed:
            old = self._opened
            self._start(opened)
        old.close()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        mode = "closed" if self._closed else "read-only" if self._writer is None else "open"
        return f"<DiskTier {mode}, {len(self._table)} records, {self._table.payload_bytes} bytes>"

    def scan(self) -> list[Record]:
        """Own records, parents before children; those whose parent is missing are dropped."""
        with self._changed:
            records = self._table.scan()
            self._wake()
        packing = self._packing
        if packing is None:
            return records
        return [evolve(each, num_bytes=packing.plain_bytes(each.num_bytes)) for each in records]

    def put(self, record: Record, payload: Sequence[Buffer]) -> bool:
        """Queue a record for the writer; False if it is refused now: it may come again later.

        True without any work if the tier has it. An event follows each key that was taken, unless
        the owner drops it before; until then, or until `flush` returns, the buffers must stay as
        they are. Evicts to make room. A record whose parent is not here is refused, since no scan
        would find it.
        """
        num_bytes = sum(memoryview(buffer).nbytes for buffer in payload)
        if num_bytes != record.num_bytes:
            raise ValueError(f"{record!r} comes with {num_bytes} bytes of payload")
        record = self._stored(record)
        with self._changed:
            known = self._table.get(record.key)
            if known is not None and known.header.holds(record):
                self._table.touch(record.key, record.last_used_s)
                if known.is_written:
                    self._table.news[record.key] = True
                return True
            entry = None
            # Another record of the same key is a collision: the older one stays.
            is_new = known is None and (not record.start or self._table.get(record.parent))
            if is_new and self._writer is not None and self._writer.accepts(record.num_bytes):
                entry = self._reserve(record)
            if entry is None or self._writer is None:
                self._table.counts.refused += 1
                return False
            self._writer.queue(entry, record, payload)
            return True

    def read(self, record: Record, into: Sequence[Buffer]) -> bool:
        """Fill the buffers with a record's payload, straight from the file; False on a miss.

        After a miss they hold rubbish. What does not fit its header or checksum is dropped.
        """
        record = self._stored(record)
        with self._changed:
            entry = self._table.get(record.key)
            if self._closed or entry is None or not entry.is_written:
                return False
            if not entry.header.holds(record):
                return False
        if self._packing is None:
            return self._read(entry, into)
        packed = np.empty(record.num_bytes, np.uint8)
        if not self._read(entry, [packed]):
            return False
        self._packing.unpack(packed, into)
        return True

    def prefetch(self, records: Sequence[Record]) -> None:
        """Have the system read these soon: a record ahead of `read`, cold reads gain 1.4 x."""
        with self._changed:
            found = [self._table.get(record.key) for record in records]
        for entry in found:
            if entry is not None and entry.is_written and not self._closed:
                self._opened.payload.prefetch(entry.grain, entry.num_grains * GRAIN_BYTES)

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        """Note a use at `now`; it is written with the next batch."""
        with self._changed:
            for key in keys:
                self._table.touch(key, now)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget records; unknown keys are fine. Their bytes stay until they are overwritten."""
        with self._changed:
            self._remove(keys)
            self._wake()

    def erase(self, keys: Sequence[bytes]) -> None:
        """Forget records, and overwrite their bytes wherever they are; done after `flush`.

        Raises TierUnavailable in a read-only tier.
        """
        if self._writer is None:
            raise TierUnavailable(
                f"{self._folder} is written by another engine: erase through that one, or close it"
            )
        with self._changed:
            self._remove(keys)
            self._writer.wake(scrub=True)

    def events(self) -> TierEvents:
        """Keys that became durable, and keys evicted, corrupt or not written, since last asked."""
        with self._changed:
            news, self._table.news = self._table.news, {}
        return TierEvents(
            written=tuple(key for key, is_durable in news.items() if is_durable),
            dropped=tuple(key for key, is_durable in news.items() if not is_durable),
        )

    def flush(self) -> None:
        """Wait until all that was asked before is durable, or has failed and was counted."""
        if self._writer is not None:
            self._writer.flush()

    def verify(self) -> Iterator[bool]:
        """Read everything, of every fingerprint: True for each whole record, the rest is dropped.

        The caller drives it, and may show progress.
        """
        for entry in self._table:
            if entry.is_written:
                yield self._read(entry, [bytearray(entry.header.payload_bytes)])

    def file_bytes(self) -> int:
        """What the files take. Asks the file system, which `stats` does not."""
        return file_bytes(self._folder)

    def has(self, key: bytes) -> bool:
        """Whether a record of any fingerprint has this key."""
        with self._changed:
            return self._table.get(key) is not None

    def keys(self) -> list[bytes]:
        """The keys of all records, of any fingerprint."""
        with self._changed:
            return [entry.key for entry in self._table]

    def contents(self) -> list[Contents]:
        """What the folder holds of each fingerprint, the largest first."""
        with self._changed:
            return self._table.contents()

    def stats(self) -> TierStats:
        """A snapshot of the counts."""
        with self._changed:
            counts = self._table.counts
            return TierStats(
                records=len(self._table),
                payload_bytes=self._table.payload_bytes,
                queued_bytes=0 if self._writer is None else self._writer.queued_bytes,
                written=counts.written,
                refused=counts.refused,
                dropped_corrupt=counts.dropped_corrupt,
                dropped_orphans=counts.dropped_orphans,
                dropped_foreign=counts.dropped_foreign,
                evicted=counts.evicted,
                write_errors=counts.write_errors,
                rebuilds=counts.rebuilds,
                read_only=self._writer is None,
            )

    def check(self) -> None:
        """Raise CacheCorrupt unless the books agree; for tests, it reads all of them."""
        with self._changed:
            self._table.check()
            if self._writer is not None and self._writer.failure is not None:
                raise CacheCorrupt("the writer died: a bug") from self._writer.failure

    def close(self) -> None:
        """Write what is queued and let go of the folder. Again is fine."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        if self._writer is not None:
            self._writer.close()
        self._opened.close()

    def _stored(self, record: Record) -> Record:
        """The record with as many bytes as it has in the file."""
        if self._packing is None:
            return record
        return evolve(record, num_bytes=self._packing.packed_bytes(record.num_bytes))

    def _reserve(self, record: Record) -> Entry | None:
        """Find an extent for a record, and evict for it."""
        table = self._table
        if record.num_bytes > (table.extents.limit - table.extents.first) * GRAIN_BYTES:
            return None
        while (entry := table.add(record)) is None:
            victims = self._next_victims(record)
            for victim in victims:
                table.evict(victim)
            if not victims:
                return None
        return entry

    def _next_victims(self, record: Record) -> list[Entry]:
        """What goes next for the sake of a record: foreign ones, then what the owner says."""
        victim = self._table.victim(keep=record.parent)
        if victim is not None:
            return [victim]
        keys = self._victims(record.num_bytes) if self._victims is not None else ()
        found = {key: self._table.get(key) for key in keys if key != record.parent}
        return [entry for entry in found.values() if entry is not None]

    def _read(self, entry: Entry, into: Sequence[Buffer]) -> bool:
        header = entry.header
        num_bytes = sum(memoryview(buffer).nbytes for buffer in into)
        if num_bytes != header.payload_bytes:
            raise ValueError(f"{num_bytes} bytes of room for a payload of {header.payload_bytes}")
        try:
            is_whole = self._opened.payload.read(entry.grain, header.raw, into)
        except OSError:
            is_whole = False  # a bad sector, or closed meanwhile
        if is_whole and checksum_of(into) == header.payload_checksum:
            return True
        self._note_miss(entry)
        return False

    def _note_miss(self, entry: Entry) -> None:
        """Drop what could not be read, if it was not evicted and overwritten meanwhile."""
        with self._changed:
            if self._closed or not self._table.has(entry):
                return
            self._table.drop(entry)
            if self._writer is None:
                self._table.counts.evicted += 1  # by the writer, most likely
            else:
                self._table.counts.dropped_corrupt += 1
            self._wake()

    def _remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if (entry := self._table.get(key)) is not None:
                self._table.remove(entry)

    def _wake(self) -> None:
        """Have removals written, if there are any."""
        if self._writer is not None and self._table.dirty:
            self._writer.wake()
