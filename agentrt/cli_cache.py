"""The command `cache`: what the disk tier holds; verify, trim or clear it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from agentrt.config import default_cache_dir
from agentrt.errors import TierUnavailable

if TYPE_CHECKING:
    from agentrt.cache.disk import DiskTier
    from agentrt.cli_engine import Commands

SHOWN_EVERY_S = 0.5  # of progress
DIGEST_CHARACTERS = 12


def add_cache_parser(commands: Commands) -> None:
    """`cache`."""
    text = "show what the disk tier of the KV cache holds; verify, trim or clear it"
    parser = commands.add_parser("cache", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=_cache)
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="(default: that of engines)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="read and verify every record")
    action.add_argument("--trim", type=int, metavar="MIB", help="cut the store down to this size")
    action.add_argument("--clear", action="store_true", help="remove all of it")


async def _cache(arguments: argparse.Namespace) -> None:
    await anyio.to_thread.run_sync(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from agentrt.cache.disk_writer import MIN_QUOTA_BYTES
    from agentrt.engine_tiers import STORE_FOLDER

    folder = (arguments.cache_dir or default_cache_dir()).expanduser() / STORE_FOLDER
    if not folder.is_dir():
        print(f"{folder}: no disk tier was ever used here")
        return
    held_bytes = sum(path.stat().st_size for path in folder.iterdir())
    quota_bytes = 2 * held_bytes if arguments.trim is None else arguments.trim << 20
    with _open(folder, max(quota_bytes, MIN_QUOTA_BYTES)) as tier:
        if arguments.check:
            _check(tier)
        elif arguments.clear or arguments.trim is not None:
            _need_writer(tier, folder)
        if arguments.clear:
            _clear(tier)
        _show(tier, folder)


def _open(folder: Path, quota_bytes: int) -> DiskTier:
    """The tier, for someone who owns no records of his own."""
    from agentrt.cache.disk import DiskTier
    from agentrt.cache.keys import Fingerprint

    nobody = Fingerprint(
        namespace="", model_digest="", layout="", dtype="", arithmetic="", token_bytes=1
    )
    return DiskTier(folder, quota_bytes=quota_bytes, fingerprint=nobody, clock=time.time)


def _need_writer(tier: DiskTier, folder: Path) -> None:
    if tier.stats().read_only:
        raise TierUnavailable(f"{folder} is written by a running engine: close that one first")


def _check(tier: DiskTier) -> None:
    """Verify all records; what is damaged is dropped, and computed again when it is needed."""
    total, damaged, shown_s = tier.stats().records, 0, time.monotonic()
    for number, is_whole in enumerate(tier.verify(), 1):
        damaged += not is_whole
        if time.monotonic() - shown_s >= SHOWN_EVERY_S:
            shown_s = time.monotonic()
            print(f"verified {number:,} of {total:,}", file=sys.stderr)
    print(f"verified {total:,} records: {damaged:,} damaged" + (" and dropped" if damaged else ""))


def _clear(tier: DiskTier) -> None:
    tier.erase(tier.keys())
    tier.flush()


def _show(tier: DiskTier, folder: Path) -> None:
    print(f"{folder}: {tier.file_bytes() / 2**20:,.1f} MiB in files")
    for part in tier.contents():
        of, age_h = part.fingerprint, (time.time() - part.last_used_s) / 3600
        print(
            f"  model {of.model_digest[:DIGEST_CHARACTERS]} ({of.layout}; {of.dtype}; "
            f"{of.arithmetic.partition(' ')[0]}), namespace "
            f"{of.namespace!r}: {part.records:,} records, {part.payload_bytes / 2**20:,.1f} MiB, "
            f"last used {age_h:.1f} h ago"
        )
