"""The file that holds the payloads: extents of whole grains, each with its own header.

Plain reads and writes, no map: a read of a file that someone shortens, or of a bad sector, is an
error here and SIGBUS, the end of the process, in a map.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from xxhash import xxh3_64

from agentrt.cache.record import Header, claimed_header_bytes, decode_header
from agentrt.cache.tier import Buffer
from agentrt.errors import TierUnavailable

# An extent wastes half a grain on average: 0.3 % of a record of 3 MB. Smaller grains would make
# the walk over a damaged file longer.
GRAIN_BYTES = 16384
_MAGIC = b"agentrt kv file\n"
_PROBE_BYTES = 4096
_MAX_BUFFERS = 512  # per system call; the limit of Linux is 1,024
_ZEROS = bytes(1 << 20)


def num_grains(num_bytes: int) -> int:
    """Grains that so many bytes take."""
    return -(-num_bytes // GRAIN_BYTES)


def checksum_of(buffers: Sequence[Buffer]) -> int:
    """xxh3_64 over the buffers, one behind the other."""
    state = xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


class PayloadFile:
    """An open payload file. Grain 0 says what it is; one thread writes, any thread reads."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open or create. Raises TierUnavailable if something else is there, or OSError."""
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._path = path
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            self._recognise(writable)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<PayloadFile {self._path}>"

    def _recognise(self, writable: bool) -> None:
        start = os.pread(self._fd, len(_MAGIC), 0)
        # Half of it is proof enough: flipped bits must not make our own file a foreign one.
        if 2 * sum(a == b for a, b in zip(start, _MAGIC, strict=False)) < len(start):
            raise TierUnavailable(
                f"{self._path} was not written by agentrt: move it away, or choose another "
                "cache_dir"
            )
        if writable and start != _MAGIC:
            os.pwrite(self._fd, _MAGIC, 0)

    def size_bytes(self) -> int:
        """The file's length."""
        return os.fstat(self._fd).st_size

    def read(self, grain: int, raw_header: bytes, into: Sequence[Buffer]) -> bool:
        """Fill `into` with the payload behind exactly this header; False if it is not there.

        The payload's checksum is the caller's to compare. Raises OSError where the disk fails.
        """
        found = bytearray(len(raw_header))
        num_read = self._read(grain * GRAIN_BYTES, [found, *into])
        wanted = len(raw_header) + sum(memoryview(buffer).nbytes for buffer in into)
        return num_read == wanted and found == raw_header

    def prefetch(self, grain: int, num_bytes: int) -> None:
        """Have the system begin to read; nothing is awaited, and an error shows in `read`."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, grain * GRAIN_BYTES, num_bytes, os.POSIX_FADV_WILLNEED)

    def write(self, grain: int, buffers: Sequence[Buffer]) -> None:
        """Write an extent, and zeros up to its last grain's end. Raises OSError."""
        views = [view for buffer in buffers if (view := memoryview(buffer).cast("B")).nbytes]
        padding = -sum(view.nbytes for view in views) % GRAIN_BYTES
        # Old bytes behind the payload would outlive an erase of what they belong to.
        views.append(memoryview(_ZEROS)[:padding])
        position = grain * GRAIN_BYTES
        while views:
            num_written = os.pwritev(self._fd, views[:_MAX_BUFFERS], position)
            position += num_written
            views = _behind(views, num_written)

    def zero(self, start: int, end: int) -> None:
        """Overwrite grains [start, end) with zeros. Raises OSError."""
        position, stop = start * GRAIN_BYTES, end * GRAIN_BYTES
        while position < stop:
            position += os.pwrite(self._fd, memoryview(_ZEROS)[: stop - position], position)

    def sync(self) -> None:
        """Make all that was written durable. Raises OSError."""
        os.fdatasync(self._fd)

    def truncate(self, end: int) -> None:
        """Cut the file behind grain `end`, if it is longer. Raises OSError."""
        if self.size_bytes() > end * GRAIN_BYTES:
            os.ftruncate(self._fd, end * GRAIN_BYTES)

    def walk(self) -> Iterator[tuple[int, Header]]:
        """(first grain, header) of all that looks like a whole record, from headers alone.

        Freed extents are found too, as long as nothing was written over them.
        """
        size_grains = num_grains(self.size_bytes())
        grain = 1
        while grain < size_grains:
            header = self._header(grain)
            if header is None:
                grain += 1
                continue
            taken = num_grains(len(header.raw) + header.payload_bytes)
            if grain + taken <= size_grains:
                yield grain, header
            grain += taken if grain + taken <= size_grains else 1

    def close(self) -> None:
        """Close the file. Again is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _header(self, grain: int) -> Header | None:
        position = grain * GRAIN_BYTES
        start = os.pread(self._fd, _PROBE_BYTES, position)
        claimed = claimed_header_bytes(start)
        if claimed is None:
            return None
        if claimed > len(start):
            start += os.pread(self._fd, claimed - len(start), position + len(start))
        return decode_header(start[:claimed])

    def _read(self, position: int, buffers: Sequence[Buffer]) -> int:
        """Fill the buffers as far as the file goes; the number of bytes read."""
        views = [view for buffer in buffers if (view := memoryview(buffer).cast("B")).nbytes]
        total = 0
        while views:
            num_read = os.preadv(self._fd, views[:_MAX_BUFFERS], position + total)
            if not num_read:
                break
            total += num_read
            views = _behind(views, num_read)
        return total


def _behind(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the views after their first `num_bytes` bytes."""
    for index, view in enumerate(views):
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= view.nbytes
    return []
