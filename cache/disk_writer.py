"""The one thread that writes to the disk tier's files, in batches."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import lmdb
from attrs import field, frozen

from agentrt.cache.disk_table import DiskTable, Entry
from agentrt.cache.index_file import IndexFile, IndexFull
from agentrt.cache.packing import Int8Packing
from agentrt.cache.payload_file import GRAIN_BYTES, PayloadFile, checksum_of
from agentrt.cache.record import make_header
from agentrt.cache.tier import Buffer, Gate, Record
from agentrt.errors import CacheCorrupt

OVERHEAD_BYTES = 8192  # the lock file, the digest
MIN_QUOTA_BYTES = 1 << 20


def payload_limit_grains(quota_bytes: int, map_bytes: int) -> int:
    """Grains that the payload file may have beside an index that fills its map."""
    return (quota_bytes - map_bytes - OVERHEAD_BYTES) // GRAIN_BYTES


def max_map_bytes(quota_bytes: int) -> int:
    """The most that an index may take."""
    return quota_bytes // 2


@frozen(kw_only=True)
class WriteOptions:
    """When the writer starts a batch, what may wait for it, and when it tries again."""

    batch_bytes: int = 32 << 20
    batch_s: float = 0.2
    queue_bytes: int = 256 << 20
    retry_s: float = 30.0


@frozen
class _Job:
    """One record to write."""

    entry: Entry
    record: Record
    payload: Sequence[Buffer] = field(repr=False)


class DiskWriter:
    """Owner of the queue, and of every write to payload file and index.

    Invariant: payload is synced before an index line points to it. The order in which a freed
    extent is written again does not matter: a reader that comes too late finds another header.
    Attributes without `_` and the table are used under `changed`; no I/O is done under it.
    """

    def __init__(
        self,
        *,
        changed: threading.Condition,
        table: DiskTable,
        payload: PayloadFile,
        index: IndexFile,
        quota_bytes: int,
        options: WriteOptions,
        clock: Callable[[], float],
        packing: Int8Packing | None,
        gate: Gate | None = None,
    ) -> None:
        self.queued_bytes = 0
        self.resume_s: float | None = None  # after an error: nothing is taken before
        self.failure: BaseException | None = None
        self._changed = changed
        self._table = table
        self._payload = payload
        self._index = index
        self._quota_bytes = quota_bytes
        self._options = options
        self._clock = clock
        self._packing = packing
        self._gate = gate  # before each record: what has precedence over the writing
        self._jobs: list[_Job] = []
        self._scrub = False  # overwrite all that no entry covers, and the old index
        self._asked = 0  # flushes
        self._done = 0
        self._closing = False
        self._woken = not index.is_open
        self._thread = threading.Thread(target=self._run, name="agentrt-disk", daemon=True)

    def __repr__(self) -> str:
        return f"<DiskWriter {len(self._jobs)} queued, {self.queued_bytes} bytes>"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def accepts(self, num_bytes: int) -> bool:
        """Whether a payload of this size may be queued now."""
        if self.failure is not None or self._closing:
            return False
        if self.resume_s is not None and self._clock() < self.resume_s:
            return False
        return not self.queued_bytes or self.queued_bytes + num_bytes <= self._options.queue_bytes

    def queue(self, entry: Entry, record: Record, payload: Sequence[Buffer]) -> None:
        """Write a record with the next batch."""
        self._jobs.append(_Job(entry, record, payload))
        self.queued_bytes += record.num_bytes
        self._changed.notify_all()

    def wake(self, *, scrub: bool = False) -> None:
        """Write removals too, soon; with `scrub` overwrite their bytes."""
        self._woken = True
        self._scrub |= scrub
        self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that was asked before is on disk, or has failed."""
        with self._changed:
            self._asked += 1
            ticket = self._asked
            self._hurry()
            self._changed.wait_for(
                lambda: self._done >= ticket or self.failure or not self._thread.is_alive()
            )
            if self.failure is not None:
                raise CacheCorrupt("the disk tier's writer died: a bug") from self.failure

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._changed:
            self._closing = True
            self._hurry()
        self._thread.join()

    def _hurry(self) -> None:
        """Someone waits for the writer."""
        self._changed.notify_all()
        if self._gate is not None:
            self._gate.look_again()

    @property
    def _is_awaited(self) -> bool:
        return self._closing or self._asked > self._done

    def _run(self) -> None:
        try:
            is_last = False
            while not is_last:
                is_last = self._wait()
                self._work()
            self._end()
        except BaseException as exc:  # a bug: whoever waits must hear of it
            with self._changed:
                self.failure = exc
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for a batch; True if it is the last."""

        def is_urgent() -> bool:
            return self.queued_bytes >= self._options.batch_bytes or self._is_awaited

        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._woken or is_urgent())
            self._changed.wait_for(is_urgent, self._options.batch_s)
            return self._closing

    def _work(self) -> None:
        """Take all that is queued and make it true on disk."""
        with self._changed:
            jobs, self._jobs = self._jobs, []
            scrub, self._scrub = self._scrub, False
            self._woken, ticket = False, self._asked
        unsaved = jobs
        try:
            self._write(jobs)
            self._commit()
            self._tell(jobs)
            unsaved = []
            if scrub:
                self._overwrite_free()
        except (OSError, lmdb.Error):
            self._fail(unsaved, scrub)
        with self._changed:
            self.queued_bytes -= sum(job.record.num_bytes for job in jobs)
            self._done = ticket
            self._changed.notify_all()

    def _write(self, jobs: Sequence[_Job]) -> None:
        """Write and sync the payloads of those that are still wanted."""
        headers = []
        for job in self._one_by_one(jobs):
            payload = job.payload if self._packing is None else self._packing.pack(job.payload)
            checksum = checksum_of(payload)
            # Asked after the checksum: once the owner let go of the record it may change the
            # buffers. What changes later does not fit the checksum, and can only be a miss.
            with self._changed:
                is_wanted = self._table.has(job.entry)
            if not is_wanted:
                continue
            header = make_header(job.record, self._table.fingerprint, checksum)
            self._payload.write(job.entry.grain, [header.raw, *payload])
            headers.append((job.entry, header))
        if headers:
            self._payload.sync()
        with self._changed:
            for entry, header in headers:
                self._table.finish(entry, header)

    def _one_by_one(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        """The jobs, each once the gate lets it pass: about 0.1 ms of the interpreter each."""
        if self._gate is None:
            yield from jobs
            return
        since_s = self._gate.clock()
        for job in jobs:
            self._gate.pass_(since_s, lambda: self._is_awaited)
            yield job

    def _commit(self) -> None:
        """Bring the index up to the table; its map grows if it must."""
        if self._index.is_open and not self._index.is_intact():
            self._index.discard()
            with self._changed:
                self._table.counts.rebuilds += 1
        # To the end: a rewrite that found its map too small leaves an open, empty index.
        is_whole = not self._index.is_open
        while True:
            with self._changed:
                dirty, self._table.dirty = self._table.dirty, set()
                lines = self._table.lines(None if is_whole else dirty)
            try:
                if is_whole:
                    self._index.rewrite(lines)
                elif lines:
                    self._index.apply(lines)
            except IndexFull:
                with self._changed:
                    self._table.dirty |= dirty
                is_whole |= self._make_index_room()
            except (OSError, lmdb.Error):
                self._give_index_up()
                raise
            else:
                return

    def _make_index_room(self) -> bool:
        """Double the index's map at the payload's cost; True if the index must be made anew.

        Only payloads smaller than their headers bring it to its most: then records go instead.
        """
        map_bytes = 2 * self._index.map_bytes
        can_grow = map_bytes <= max_map_bytes(self._quota_bytes)
        with self._changed:
            limit = self._table.extents.limit * 3 // 4
            if can_grow:
                limit = payload_limit_grains(self._quota_bytes, map_bytes)
            self._table.set_limit(limit)
        self._truncate()
        if can_grow:
            self._index.grow()
        else:
            self._index.discard()
        return not can_grow

    def _give_index_up(self) -> None:
        """After an error of the index: the next batch makes a new one."""
        self._index.close()
        # If not even this works, the old index stays, whose every line is verified by its reader.
        with contextlib.suppress(OSError):
            self._index.discard()

    def _overwrite_free(self) -> None:
        """Put zeros wherever no entry is, and make a new index.

        Not only where the erased records were: copies that were evicted earlier are erased too.
        """
        end = self._truncate()
        size_grains = min(end, self._payload.size_bytes() // GRAIN_BYTES)
        with self._changed:
            gaps = self._table.gaps(size_grains)
        for gap in gaps:
            self._payload.zero(*gap)
        self._payload.sync()
        self._index.discard()
        self._commit()

    def _truncate(self) -> int:
        """Cut what no extent needs off the payload file; the grain where extents end."""
        with self._changed:
            end = self._table.extents.end
        self._payload.truncate(end)
        return end

    def _fail(self, jobs: Sequence[_Job], scrub: bool) -> None:
        """Give a batch up and pause."""
        with self._changed:
            self._table.counts.write_errors += 1
            self.resume_s = self._clock() + self._options.retry_s
            self._scrub |= scrub
            for job in jobs:
                if self._table.has(job.entry):
                    self._table.drop(job.entry)

    def _tell(self, jobs: Sequence[_Job]) -> None:
        """Report what is durable now."""
        with self._changed:
            for job in jobs:
                if self._table.has(job.entry):
                    self._table.news[job.entry.key] = True
                    self._table.counts.written += 1

    def _end(self) -> None:
        """Leave the files as short as can be; the writer was closed."""
        try:
            self._truncate()
            self._payload.sync()
        except OSError:
            with self._changed:
                self._table.counts.write_errors += 1
        self._index.close()
