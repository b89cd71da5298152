"""The folder of a disk tier: its files, its lock, and what is in it when it is opened."""

import contextlib
import fcntl
import os
from pathlib import Path

import lmdb
from attrs import frozen

from agentrt.cache import index_file
from agentrt.cache.disk_table import DiskTable
from agentrt.cache.disk_writer import max_map_bytes, payload_limit_grains
from agentrt.cache.index_file import IndexFile, Line, load_copy
from agentrt.cache.payload_file import GRAIN_BYTES, PayloadFile
from agentrt.errors import TierUnavailable

PAYLOAD_NAME = "payload.kv"
LOCK_NAME = "lock"


@frozen(kw_only=True)
class OpenFolder:
    """Lock and index are None where another tier writes."""

    lock: int | None  # a descriptor: the lock dies with it, and so with the process
    payload: PayloadFile
    index: IndexFile | None
    table: DiskTable

    def close(self) -> None:
        """Close payload file and lock; the index is its writer's to close."""
        self.payload.close()
        if self.lock is not None:
            os.close(self.lock)


def open_folder(folder: Path, *, quota_bytes: int, fingerprint: bytes, own_lru: bool) -> OpenFolder:
    """Open or create. Raises TierUnavailable, and then nothing is left open."""
    try:
        with contextlib.ExitStack() as undo:
            lock = _acquire(folder)
            if lock is not None:
                undo.callback(os.close, lock)
            payload = PayloadFile(folder / PAYLOAD_NAME, writable=lock is not None)
            undo.callback(payload.close)
            index = IndexFile(folder) if lock is not None else None
            table = _load(folder, payload, index, fingerprint, own_lru=own_lru)
            if index is not None:
                # Files from times of a larger quota are brought within it before anything else.
                if index.map_bytes > max_map_bytes(quota_bytes):
                    index.reset()
                table.set_limit(payload_limit_grains(quota_bytes, index.map_bytes))
                payload.truncate(table.extents.end)
            undo.pop_all()
    except (OSError, lmdb.Error) as exc:
        if isinstance(exc, TierUnavailable):
            raise
        raise TierUnavailable(
            f"{folder}: {exc}: make the folder writable, choose another cache_dir, or set "
            "disk_kv_bytes=0"
        ) from exc
    return OpenFolder(lock=lock, payload=payload, index=index, table=table)


def is_being_written(folder: Path) -> bool:
    """Whether another tier has the folder's lock. Raises OSError."""
    lock = _acquire(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def file_bytes(folder: Path) -> int:
    """What the tier's files take, those that are there."""
    total = 0
    for name in (PAYLOAD_NAME, LOCK_NAME, index_file.NAME, index_file.DIGEST_NAME):
        with contextlib.suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total


def _acquire(folder: Path) -> int | None:
    """The folder's lock, or None if another tier has it. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(lock)
        if isinstance(exc, BlockingIOError):
            return None
        raise
    return lock


def _load(
    folder: Path,
    payload: PayloadFile,
    index: IndexFile | None,
    fingerprint: bytes,
    *,
    own_lru: bool,
) -> DiskTable:
    """The table, from the index or else from all headers; its limit is the file's end."""
    lines = load_copy(folder) if index is None else index.load()
    is_rebuilt = lines is None
    if lines is None:
        lines = (Line(at, header.last_used_s, header) for at, header in payload.walk())
    size_grains = payload.size_bytes() // GRAIN_BYTES
    table = DiskTable(fingerprint, size_grains, own_lru=own_lru)
    table.load(lines, size_grains)
    table.counts.rebuilds += is_rebuilt and len(table) > 0
    return table
