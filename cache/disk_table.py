"""What the disk tier holds: the decisions of it, without any I/O.

Everything here is plain bookkeeping under the tier's lock; the writer makes it true on disk.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from operator import attrgetter

from attrs import define, field

from agentrt.cache.extents import ExtentMap
from agentrt.cache.index_file import Line
from agentrt.cache.keys import Fingerprint
from agentrt.cache.payload_file import num_grains
from agentrt.cache.record import Header, make_header
from agentrt.cache.tier import Contents, Record
from agentrt.errors import CacheCorrupt

FIRST_GRAIN = 1  # grain 0 says what the file is


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Make many objects that all stay: Python would look through them again and again for garbage,
    for a seventh of the time that 100,000 records take (0.91 s with this, 1.06 s without)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@define(eq=False, kw_only=True)
class Entry:
    """A record's place. Until it is written its header lacks the payload's checksum."""

    header: Header = field(repr=False)
    grain: int
    num_grains: int
    last_used_s: float
    is_written: bool

    @property
    def key(self) -> bytes:
        """The record's key."""
        return self.header.key

    @property
    def end(self) -> int:
        """The grain behind it."""
        return self.grain + self.num_grains


@define
class Counts:
    """Counters since the opening; see TierStats."""

    written: int = 0
    refused: int = 0
    dropped_corrupt: int = 0
    dropped_orphans: int = 0
    dropped_foreign: int = 0
    evicted: int = 0
    write_errors: int = 0
    rebuilds: int = 0


class DiskTable:
    """Owner of the entries, their extents, the order of eviction, and what the index lacks.

    Invariant: entries and free runs tile the file's grains up to the limit; `dirty` has each grain
    whose line in the index may differ from what begins there. `check` verifies.
    """

    def __init__(self, fingerprint: bytes, limit_grains: int, *, own_lru: bool) -> None:
        self.fingerprint = fingerprint
        self.extents = ExtentMap(FIRST_GRAIN, max(limit_grains, FIRST_GRAIN))
        self.counts = Counts()
        self.payload_bytes = 0
        self.dirty: set[int] = set()
        # For the owner's next poll: key -> whether it is durable, or gone. The last word counts,
        # and none that was said before the key was put again.
        self.news: dict[bytes, bool] = {}
        self._entries: dict[bytes, Entry] = {}
        self._by_grain: dict[int, Entry] = {}
        self._num_children: dict[bytes, int] = {}
        self._own_lru = own_lru
        # Heap of (is own, last use when queued, serial, entry); void if the entry is gone. It has
        # each foreign leaf, and each own one if nobody else says what to evict.
        self._by_use: list[tuple[bool, float, int, Entry]] | None = None  # until it is asked for
        self._serials = count()

    def __repr__(self) -> str:
        return f"<DiskTable {len(self._entries)} entries, {self.extents!r}>"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def get(self, key: bytes) -> Entry | None:
        """The entry of a key."""
        return self._entries.get(key)

    def has(self, entry: Entry) -> bool:
        """Whether this very entry is still the one of its key."""
        return self._entries.get(entry.key) is entry

    def load(self, lines: Iterable[Line], size_grains: int) -> None:
        """Take over what index or walk found, but for what cannot be in so long a file."""
        with paused_collector():
            self._load(lines, size_grains)

    def _load(self, lines: Iterable[Line], size_grains: int) -> None:
        end = FIRST_GRAIN
        for grain, last_used_s, header in lines:  # by grain
            if header is None:
                continue
            grains = num_grains(len(header.raw) + header.payload_bytes)
            is_inside = grain + grains <= size_grains
            if grain < end or not is_inside or header.key in self._entries:
                self.dirty.add(grain)
                self.counts.dropped_corrupt += not is_inside
                continue
            entry = Entry(
                header=header,
                grain=grain,
                num_grains=grains,
                last_used_s=last_used_s,
                is_written=True,
            )
            self._insert(entry)
            end = grain + grains
        # The entries are in the order of their grains now.
        taken = [(entry.grain, entry.num_grains) for entry in self._entries.values()]
        self.extents = ExtentMap(FIRST_GRAIN, self.extents.limit, taken)

    def scan(self) -> list[Record]:
        """Own written records, parents first; those without their parent are dropped."""
        with paused_collector():
            return self._scan()

    def _scan(self) -> list[Record]:
        own = [
            entry.header.record(entry.last_used_s)
            for entry in self._entries.values()
            if entry.is_written and self._is_own(entry)
        ]
        own.sort(key=attrgetter("start"))
        ends: dict[bytes, int] = {}
        records = []
        for record in own:
            # A first chunk's parent is the root's key, which is no record.
            if record.start and ends.get(record.parent) != record.start:
                self.remove(self._entries[record.key])
                self.counts.dropped_orphans += 1
                continue
            ends[record.key] = record.end
            records.append(record)
        return records

    def contents(self) -> list[Contents]:
        """What there is of each fingerprint, the largest first."""
        groups: dict[bytes, list[Entry]] = {}
        for entry in self._entries.values():
            groups.setdefault(entry.header.fingerprint, []).append(entry)
        contents = [
            Contents(
                fingerprint=Fingerprint.decode(encoded),
                records=len(entries),
                payload_bytes=sum(entry.header.payload_bytes for entry in entries),
                last_used_s=max(entry.last_used_s for entry in entries),
            )
            for encoded, entries in groups.items()
        ]
        return sorted(contents, key=lambda of_one: -of_one.payload_bytes)

    def add(self, record: Record) -> Entry | None:
        """Reserve an extent for a record; None, and no change, if no free run is long enough."""
        header = make_header(record, self.fingerprint, 0)
        grains = num_grains(len(header.raw) + record.num_bytes)
        grain = self.extents.allocate(grains)
        if grain is None:
            return None
        entry = Entry(
            header=header,
            grain=grain,
            num_grains=grains,
            last_used_s=record.last_used_s,
            is_written=False,
        )
        self._insert(entry)
        self._queue(entry)
        self.news.pop(record.key, None)
        return entry

    def finish(self, entry: Entry, header: Header) -> None:
        """Note that an entry is on disk, unless it was removed meanwhile."""
        if self.has(entry):
            entry.header, entry.is_written = header, True
            self.dirty.add(entry.grain)

    def touch(self, key: bytes, now: float) -> None:
        """Note a use."""
        entry = self._entries.get(key)
        if entry is not None and now > entry.last_used_s:
            entry.last_used_s = now
            self.dirty.add(entry.grain)

    def remove(self, entry: Entry) -> None:
        """Forget an entry and free its extent."""
        header = entry.header
        del self._entries[header.key], self._by_grain[entry.grain]
        self.dirty.add(entry.grain)
        self.payload_bytes -= header.payload_bytes
        self.extents.free(entry.grain, entry.num_grains)
        left = self._num_children.pop(header.parent) - 1
        if left:
            self._num_children[header.parent] = left
        elif (parent := self._entries.get(header.parent)) is not None:
            self._queue(parent)

    def drop(self, entry: Entry) -> None:
        """Remove an entry, and tell the owner at its next poll."""
        self.remove(entry)
        self.news[entry.key] = False

    def evict(self, entry: Entry) -> None:
        """Drop an entry for the room that it takes."""
        self.drop(entry)
        self.counts.evicted += 1
        self.counts.dropped_foreign += not self._is_own(entry)

    def victim(self, keep: bytes) -> Entry | None:
        """The next entry to evict, not `keep`: foreign leaves by last use, then own ones."""
        kept: Entry | None = None
        found: Entry | None = None
        if self._by_use is None:
            self._by_use = self._queue_all()
        while self._by_use and found is None:
            _, queued_s, _, entry = heappop(self._by_use)
            if not self.has(entry) or entry.key in self._num_children:
                continue
            if entry.last_used_s > queued_s:
                self._queue(entry)
            elif entry.key == keep:
                kept = entry
            else:
                found = entry
        if kept is not None:
            self._queue(kept)
        return found

    def set_limit(self, limit_grains: int) -> None:
        """Move the end of the file's room; what lies beyond it is evicted."""
        limit = max(limit_grains, FIRST_GRAIN)
        for entry in self:
            if entry.end > limit:
                self.evict(entry)
        self.extents.set_limit(limit)

    def lines(self, grains: Iterable[int] | None = None) -> list[Line]:
        """The index's lines of these grains, or all lines that it must have."""
        if grains is None:
            grains = [entry.grain for entry in self._entries.values() if entry.is_written]
        return [self._line(grain) for grain in grains]

    def gaps(self, size_grains: int) -> list[tuple[int, int]]:
        """Grains [start, end) of a file of this size that no written entry covers."""
        gaps, position = [], FIRST_GRAIN
        extents = [
            (entry.grain, entry.num_grains) for entry in self._entries.values() if entry.is_written
        ]
        for start, num in [*sorted(extents), (size_grains, 0)]:
            if position < start:
                gaps.append((position, start))
            position = start + num
        return gaps

    def check(self) -> None:
        """Raise CacheCorrupt unless the books agree; it reads all of them."""
        self.extents.check((entry.grain, entry.num_grains) for entry in self)
        children: dict[bytes, int] = {}
        for entry in self:
            parent = entry.header.parent
            children[parent] = children.get(parent, 0) + 1
        if {entry.grain: entry for entry in self} != self._by_grain:
            raise CacheCorrupt("the table by grain has other entries than the one by key")
        if children != self._num_children:
            raise CacheCorrupt("the counts of children are wrong")
        if self.payload_bytes != sum(entry.header.payload_bytes for entry in self):
            raise CacheCorrupt(f"{self.payload_bytes} payload bytes are not the entries' sum")
        queued = {id(entry) for _, _, _, entry in self._by_use or ()}
        for entry in self:
            if self._by_use is not None and self._is_queued(entry) and id(entry) not in queued:
                raise CacheCorrupt(f"{entry!r} can go and is not in the queue")

    def _is_own(self, entry: Entry) -> bool:
        return entry.header.fingerprint == self.fingerprint

    def _is_queued(self, entry: Entry) -> bool:
        return entry.key not in self._num_children and (self._own_lru or not self._is_own(entry))

    def _queue(self, entry: Entry) -> None:
        if self._by_use is not None and self._is_queued(entry):
            heappush(self._by_use, self._item(entry))
            if len(self._by_use) > 64 + 2 * len(self._entries):
                self._by_use = self._queue_all()  # most of it is void

    def _queue_all(self) -> list[tuple[bool, float, int, Entry]]:
        items = [self._item(entry) for entry in self if self._is_queued(entry)]
        heapify(items)
        return items

    def _item(self, entry: Entry) -> tuple[bool, float, int, Entry]:
        return self._is_own(entry), entry.last_used_s, next(self._serials), entry

    def _insert(self, entry: Entry) -> None:
        header = entry.header
        self._entries[header.key] = entry
        self._by_grain[entry.grain] = entry
        self._num_children[header.parent] = self._num_children.get(header.parent, 0) + 1
        self.payload_bytes += header.payload_bytes

    def _line(self, grain: int) -> Line:
        entry = self._by_grain.get(grain)
        if entry is None or not entry.is_written:
            return Line(grain)
        return Line(grain, entry.last_used_s, entry.header)
