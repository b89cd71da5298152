"""The index: an LMDB environment with the headers of all records, and a digest of its file.

liblmdb trusts its file: a flipped bit in a page of its tree can end the process. So it is never
handed a file that was not verified: behind each commit the digest of the whole index (0.5 KB a
record: milliseconds) is put beside it, and at opening it must fit. Where it does not, because of
damage or because the process died between the two, the index is made anew from the headers in the
payload file. It is a cache of those: nothing is lost with it.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import lmdb
from xxhash import xxh3_64_intdigest, xxh3_128, xxh3_128_digest

from agentrt.cache.keys import FORMAT_VERSION
from agentrt.cache.record import Header, decode_header

NAME = "index.lmdb"
DIGEST_NAME = "index.digest"
MIN_MAP_BYTES = 1 << 18
_SUM = struct.Struct("<6sHQ16s")  # magic, version, length and digest of the index
_SUM_MAGIC = b"aKVind"
# Key: the first grain. So the lines lie in the order in which a growing file gets its records,
# and their pages are full; with the records' own keys they were half empty.
_KEY = struct.Struct(">Q")
_LAST_USED = struct.Struct("<d")  # the raw header follows
_PIECE_BYTES = 1 << 20
_READ_ATTEMPTS = 20


class IndexFull(Exception):
    """The map is full: grow it and apply again."""


class Line(NamedTuple):
    """One line of the index: what begins at a grain. Without a header: nothing does."""

    grain: int
    last_used_s: float = 0.0
    header: Header | None = None


class IndexFile:
    """The index of the folder's one writer. Used by one thread at a time.

    Invariant: whenever the digest on disk fits the file, the file is a whole LMDB environment
    whose lines are those of the last `apply` that returned.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest: tuple[int, bytes] | None = None  # of the file, since the last commit
        self._environment: lmdb.Environment | None = None
        self.map_bytes = MIN_MAP_BYTES

    def __repr__(self) -> str:
        state = "open" if self._environment is not None else "closed"
        return f"<IndexFile {state}, map of {self.map_bytes} bytes>"

    @property
    def is_open(self) -> bool:
        """Whether the file can take changes; if not, `rewrite` it."""
        return self._environment is not None

    def load(self) -> Iterator[Line] | None:
        """Verify, open and read all; None, and not open, if the index cannot be trusted."""
        path = self._folder / NAME
        try:
            self._digest = _digest_on_disk(self._folder)
            if not self.is_intact():
                return None
            while self.map_bytes < 2 * path.stat().st_size:
                self.map_bytes *= 2
            self._open()
        except (FileNotFoundError, lmdb.Error):  # the latter of another liblmdb's format
            return None
        assert self._environment is not None
        return _lines(self._environment)

    def is_intact(self) -> bool:
        """Whether the file is what the last commit left: liblmdb must not be given another.

        It takes a millisecond for 10,000 records.
        """
        try:
            return self._digest is not None and self._digest == _digest_of(self._folder / NAME)
        except FileNotFoundError:
            return False

    def apply(self, lines: Iterable[Line]) -> None:
        """Make these lines durable, all or none; the others stay.

        Raises IndexFull, lmdb.Error or OSError; after one of the latter two, `discard`.
        """
        assert self._environment is not None, "the index is not open"
        try:
            with self._environment.begin(write=True) as transaction:
                for grain, last_used_s, header in sorted(lines, key=itemgetter(0)):
                    if header is None:
                        transaction.delete(_KEY.pack(grain))
                    else:
                        value = _LAST_USED.pack(last_used_s) + header.raw
                        transaction.put(_KEY.pack(grain), value)
        except (lmdb.MapFullError, lmdb.TxnFullError) as exc:
            raise IndexFull from exc
        self._write_digest()

    def grow(self) -> None:
        """Double the map."""
        self.map_bytes *= 2
        if self._environment is not None:
            self._environment.set_mapsize(self.map_bytes)

    def rewrite(self, lines: Iterable[Line]) -> None:
        """Make a new file of these; the old one's bytes are overwritten. Errors as of `apply`."""
        self.discard()
        self._open()
        self.apply(lines)

    def discard(self) -> None:
        """Close, overwrite and remove the file. Raises OSError."""
        self.close()
        self._digest = None
        # The digest goes first: from here on a crash leads to a new index.
        (self._folder / DIGEST_NAME).unlink(missing_ok=True)
        path = self._folder / NAME
        with contextlib.suppress(FileNotFoundError):
            overwrite(path)
            path.unlink()

    def reset(self) -> None:
        """Discard the file, and begin with the smallest map again. Raises OSError."""
        self.discard()
        self.map_bytes = MIN_MAP_BYTES

    def close(self) -> None:
        """Close the environment. Again is fine."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _open(self) -> None:
        # No lock file: the folder's lock admits one writer, and readers read copies.
        self._environment = lmdb.open(
            str(self._folder / NAME), map_size=self.map_bytes, subdir=False, lock=False, mode=0o600
        )

    def _write_digest(self) -> None:
        self._digest = _digest_of(self._folder / NAME)
        path = self._folder / DIGEST_NAME
        with open(path, "wb", opener=_private, buffering=0) as file:
            file.write(_sealed(*self._digest))


def load_copy(folder: Path) -> Iterator[Line] | None:
    """The lines of an index that another process may be writing; None if none can be trusted.

    A copy is verified and read, so that nobody can change it in between. A commit during the copy
    shows in the digest.
    """
    for _ in range(_READ_ATTEMPTS):
        try:
            wanted = _digest_on_disk(folder)
            raw = (folder / NAME).read_bytes()
        except FileNotFoundError:
            return None
        if wanted == (len(raw), xxh3_128_digest(raw)):
            return _lines_of(raw)
    return None


def overwrite(path: Path) -> None:
    """Replace a file's bytes by zeros, on disk. Raises OSError."""
    with path.open("r+b", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left:
            left -= file.write(bytes(min(left, _PIECE_BYTES)))
        os.fsync(file.fileno())


def _lines_of(raw: bytes) -> Iterator[Line]:
    # Without a name, since it would stay if the process were killed now.
    with tempfile.TemporaryFile(buffering=0) as copy:
        copy.write(raw)
        path = f"/dev/fd/{copy.fileno()}"
        with lmdb.open(
            path, map_size=2 * len(raw), subdir=False, lock=False, readonly=True
        ) as environment:
            yield from _lines(environment)


def _lines(environment: lmdb.Environment) -> Iterator[Line]:
    """All lines, by grain: one at a time, since a list of 100,000 keeps the collector busy."""
    with environment.begin() as transaction:
        for key, value in transaction.cursor():
            # The digest covers the headers' own checksums, and its version is theirs.
            header = decode_header(value[_LAST_USED.size :], trusted=True)
            (grain,), (last_used_s,) = _KEY.unpack(key), _LAST_USED.unpack_from(value)
            yield Line(grain, last_used_s, header)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _digest_of(path: Path) -> tuple[int, bytes]:
    state, size_bytes = xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        piece = bytearray(_PIECE_BYTES)
        while num_read := file.readinto(piece):
            state.update(memoryview(piece)[:num_read])
            size_bytes += num_read
    return size_bytes, state.digest()


def _sealed(size_bytes: int, digest: bytes) -> bytes:
    body = _SUM.pack(_SUM_MAGIC, FORMAT_VERSION, size_bytes, digest)
    return body + xxh3_64_intdigest(body).to_bytes(8, "little")


def _digest_on_disk(folder: Path) -> tuple[int, bytes] | None:
    raw = (folder / DIGEST_NAME).read_bytes()
    if len(raw) != _SUM.size + 8:
        return None
    _, _, size_bytes, digest = _SUM.unpack_from(raw)
    return (size_bytes, digest) if raw == _sealed(size_bytes, digest) else None
