"""The disk tier, and what it was chosen over: payloads as LMDB values.

    python benchmarks/disk_tier.py --folder DIR [--only sizes,churn,scan,put,damage] [--json FILE]
    python benchmarks/disk_tier.py --folder DIR --only harm --crash 300 --flips 10000
        --truncations 1000

sizes: write and read rates by record size; `write` syncs each 32 MiB. `cold` is after the file was
dropped from the page cache, `first` with it there but in a new map. churn: a full store, mixed
sizes, least recent out. scan: opening 100,000 records. put: how long the owner is held up. damage:
bits flipped in B-tree pages of an LMDB environment that holds payloads, each in a child. harm:
tests/disk_damage.py, the same to the tier. DIR should be on the disk in question.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import xxhash

from agentrt.cache.disk import DiskTier
from agentrt.cache.disk_writer import WriteOptions
from agentrt.cache.keys import Fingerprint, chunk_key, root_key
from agentrt.cache.payload_file import PayloadFile, num_grains
from agentrt.cache.tier import Record

BATCH_BYTES = 32 << 20
SIZES_BYTES = [64 << 10, 256 << 10, 1 << 20, 45 * 65536, 4 << 20, 16 << 20]
TOTAL_BYTES = 384 << 20
TOKEN_BYTES = 46_080  # SmolLM2-135M in float32
CHUNK_TOKENS = 64


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def evict_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mb_per_s(num_bytes: int, begin: float) -> int:
    return round(num_bytes / (time.perf_counter() - begin) / 1e6)


class LmdbValues:
    """Payloads as values of an LMDB environment."""

    def __init__(self, folder: Path, **flags: bool) -> None:
        self.path = folder / "data.mdb"
        self._flags = flags
        self.open()

    def open(self) -> None:
        self.environment = lmdb.open(str(self.path.parent), map_size=2 * TOTAL_BYTES, **self._flags)

    def close(self) -> None:
        self.environment.close()

    def write(self, first: int, values: Sequence[bytes]) -> None:
        with self.environment.begin(write=True) as transaction:
            for index, value in enumerate(values, first):
                transaction.put(index.to_bytes(16, "big"), value)
        self.environment.sync(True)

    def prefetch(self, index: int, num_bytes: int) -> None:
        """A map has nothing of the kind through lmdb."""

    def read(self, index: int, into: np.ndarray) -> None:
        with self.environment.begin(buffers=True) as transaction:
            view = transaction.get(index.to_bytes(16, "big"))
            xxhash.xxh3_64_intdigest(view)
            into[:] = np.frombuffer(view, np.uint8)


class Extents:
    """Payloads in extents of a plain file, as the tier has them (here without its index)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "payload.kv"
        self.open()

    def open(self) -> None:
        self._file = PayloadFile(self.path, writable=True)

    def close(self) -> None:
        self._file.close()

    def write(self, first: int, values: Sequence[bytes]) -> None:
        for index, value in enumerate(values, first):
            self._file.write(1 + index * num_grains(len(value)), [value])
        self._file.sync()

    def prefetch(self, index: int, num_bytes: int) -> None:
        self._file.prefetch(1 + index * num_grains(num_bytes), num_bytes)

    def read(self, index: int, into: np.ndarray) -> None:
        self._file.read(1 + index * num_grains(into.nbytes), b"", [into])
        xxhash.xxh3_64_intdigest(into)


def measure_size(store: LmdbValues | Extents, num_bytes: int) -> dict[str, int]:
    count = max(TOTAL_BYTES // num_bytes, 1)
    per_batch = max(BATCH_BYTES // num_bytes, 1)
    value = np.random.default_rng(0).bytes(num_bytes)
    begin = time.perf_counter()
    for first in range(0, count, per_batch):
        store.write(first, [value] * min(per_batch, count - first))
    row = {"write": mb_per_s(count * num_bytes, begin)}
    into = np.ones(num_bytes, np.uint8)

    def read_all(name: str) -> None:
        begin = time.perf_counter()
        order = random.Random(0).sample(range(count), count)
        for index, following in zip(order, [*order[1:], order[-1]], strict=True):
            store.prefetch(following, num_bytes)
            store.read(index, into)
        row[name] = mb_per_s(count * num_bytes, begin)

    store.close()
    evict_from_page_cache(store.path)  # nothing of it is mapped now
    store.open()
    read_all("cold")
    store.close()
    store.open()
    read_all("first")
    read_all("warm")
    store.close()
    return row


def measure_sizes(folder: Path) -> list[dict[str, Any]]:
    """MB/s by record size and store; the median of three runs."""
    stores: dict[str, Callable[[Path], LmdbValues | Extents]] = {
        "extents": Extents,
        "lmdb": LmdbValues,
        "lmdb writemap": lambda path: LmdbValues(path, writemap=True),
        "lmdb writemap map_async": lambda path: LmdbValues(path, writemap=True, map_async=True),
    }
    rows = []
    for num_bytes in SIZES_BYTES:
        runs: dict[str, list[dict[str, int]]] = {name: [] for name in stores}
        for _ in range(3):
            for name, make in stores.items():
                with fresh(folder / "sizes") as path:
                    runs[name].append(measure_size(make(path), num_bytes))
        for name, found in runs.items():
            medians = {key: round(statistics.median(run[key] for run in found)) for key in found[0]}
            rows.append({"record_bytes": num_bytes, "store": name, **medians})
            print(f"{num_bytes / 1024:8.0f} KiB {name:24} " + json.dumps(medians))
    return rows


def churn_sizes(count: int) -> list[int]:
    """Payload sizes in tokens of a session-like mix: runs of whole chunks, then a tail."""
    chance, tokens = random.Random(1), []
    while len(tokens) < count:
        tokens += [CHUNK_TOKENS] * chance.randrange(1, 12)
        tokens.append(chance.randrange(1, CHUNK_TOKENS))
    return tokens[:count]


def churn_lmdb(folder: Path, quota_bytes: int, tokens: list[int]) -> dict[str, Any]:
    """Least recent out, one commit a batch, whatever eviction a full map takes."""
    environment = lmdb.open(str(folder), map_size=quota_bytes)
    value = np.random.default_rng(0).bytes(CHUNK_TOKENS * TOKEN_BYTES)
    live: list[tuple[int, int]] = []
    written = full = 0
    fills, begin = [], time.perf_counter()
    index = 0
    while index < len(tokens):
        batch = tokens[index : index + 10]
        try:
            with environment.begin(write=True) as transaction:
                for offset, num in enumerate(batch):
                    key = (index + offset).to_bytes(16, "big")
                    transaction.put(key, memoryview(value)[: num * TOKEN_BYTES])
        except lmdb.MapFullError:
            # Freed pages serve from the next commits on: evict as much as the batch has.
            full += 1
            with environment.begin(write=True) as transaction:
                room = sum(batch)
                while room > 0 and live:
                    gone, num = live.pop(0)
                    transaction.delete(gone.to_bytes(16, "big"))
                    room -= num
            continue
        live += list(enumerate(batch, index))
        written += sum(batch) * TOKEN_BYTES
        index += len(batch)
        if index > len(tokens) // 2:
            fills.append(sum(num for _, num in live) * TOKEN_BYTES / quota_bytes)
    rate = mb_per_s(written, begin)
    environment.close()
    return {"write": rate, "fill": round(statistics.mean(fills), 3), "full": full}


def make_fingerprint(token_bytes: int) -> Fingerprint:
    return Fingerprint(
        namespace="", model_digest="d" * 64, layout="L30KV3D64", dtype="float32", arithmetic="",
        token_bytes=token_bytes,
    )  # fmt: skip


def make_records(count: int, token_bytes: int, chain: int = 16) -> list[Record]:
    """Whole chunks, in chains of `chain`."""
    root, records = root_key(make_fingerprint(token_bytes)), []
    for index in range(count):
        depth = index % chain
        parent = records[-1].key if depth else root
        tokens = np.full(CHUNK_TOKENS, index, np.int32)
        records.append(
            Record(
                key=chunk_key(parent, tokens),
                parent=parent,
                token_ids=tokens,
                start=depth * CHUNK_TOKENS,
                num_bytes=CHUNK_TOKENS * token_bytes,
                last_used_s=float(index),
            )
        )
    return records


def open_tier(folder: Path, quota_bytes: int, token_bytes: int, **options: float) -> DiskTier:
    return DiskTier(
        folder,
        quota_bytes=quota_bytes,
        fingerprint=make_fingerprint(token_bytes),
        clock=time.monotonic,
        options=WriteOptions(**options),
    )


def churn_tier(folder: Path, quota_bytes: int, tokens: list[int]) -> dict[str, Any]:
    value = np.random.default_rng(0).bytes(CHUNK_TOKENS * TOKEN_BYTES)
    root, written, fills = root_key(make_fingerprint(TOKEN_BYTES)), 0, []
    largest = 0
    with open_tier(folder, quota_bytes, TOKEN_BYTES) as tier:
        begin = time.perf_counter()
        for index, num in enumerate(tokens):
            ids = np.full(num, index, np.int32)
            record = Record(
                key=chunk_key(root, ids), parent=root, token_ids=ids, start=0,
                num_bytes=num * TOKEN_BYTES, last_used_s=float(index),
            )  # fmt: skip
            while not tier.put(record, [memoryview(value)[: record.num_bytes]]):
                tier.flush()
            written += record.num_bytes
            if index > len(tokens) // 2 and index % 10 == 0:
                stats = tier.stats()
                fills.append(stats.payload_bytes / quota_bytes)
                largest = max(largest, tier.file_bytes())
        tier.flush()
        rate = mb_per_s(written, begin)
        assert tier.stats().write_errors == 0
    return {
        "write": rate,
        "fill": round(statistics.mean(fills), 3),
        "over_quota": largest > quota_bytes,
    }


def measure_churn(folder: Path) -> list[dict[str, Any]]:
    """A store of 512 MB through which 4 GB go."""
    quota_bytes, tokens = 512 << 20, churn_sizes(1800)
    rows = []
    for name, churn in (("tier", churn_tier), ("lmdb", churn_lmdb)):
        with fresh(folder / "churn") as path:
            rows.append({"store": name, **churn(path, quota_bytes, tokens)})
            print(json.dumps(rows[-1]))
    return rows


def measure_scan(folder: Path, count: int) -> dict[str, Any]:
    """Seconds to open and list `count` records: with the index, as a reader, without the index."""
    token_bytes, quota_bytes = 64, 8 << 30
    row: dict[str, Any] = {"records": count}
    with fresh(folder / "scan") as path:
        with open_tier(path, quota_bytes, token_bytes) as tier:
            payload = bytes(CHUNK_TOKENS * token_bytes)
            for record in make_records(count, token_bytes):
                while not tier.put(record, [payload]):
                    tier.flush()
        row["index_bytes"] = (path / "index.lmdb").stat().st_size

        def timed(name: str) -> DiskTier:
            begin = time.perf_counter()
            tier = open_tier(path, quota_bytes, token_bytes)
            found = len(tier.scan())
            row[name] = round(time.perf_counter() - begin, 3)
            assert found == count, found
            return tier

        with timed("index_s"), timed("reader_s"):
            pass
        evict_from_page_cache(path / "index.lmdb")
        timed("index_cold_s").close()
        (path / "index.digest").unlink()
        with timed("walk_s") as tier:
            begin = time.perf_counter()
            tier.flush()
            row["new_index_s"] = round(time.perf_counter() - begin, 3)
            tier.touch([tier.scan()[0].key], 1e12)
            begin = time.perf_counter()
            tier.flush()
            row["commit_one_s"] = round(time.perf_counter() - begin, 3)
    print(json.dumps(row))
    return row


def measure_put(folder: Path) -> dict[str, Any]:
    """Microseconds that a `put` of 3 MB holds its caller up, while the writer works."""
    value = np.random.default_rng(0).bytes(CHUNK_TOKENS * TOKEN_BYTES)
    took, refused = [], 0
    with fresh(folder / "put") as path, open_tier(path, 1 << 30, TOKEN_BYTES) as tier:
        for record in make_records(600, TOKEN_BYTES):
            begin = time.perf_counter()
            refused += not tier.put(record, [value])
            took.append(1e6 * (time.perf_counter() - begin))
            time.sleep(0.01)
    took.sort()
    row = {"median_us": round(took[300]), "p99_us": round(took[594]), "max_us": round(took[-1])}
    row["refused"] = refused
    print(json.dumps(row))
    return row


def measure_damage(folder: Path, count: int) -> dict[str, int]:
    """What becomes of a process that opens an LMDB environment with one bit flipped in its tree."""
    found = {"same": 0, "error": 0, "wrong": 0, "crash": 0}
    with fresh(folder / "damage") as path:
        environment = lmdb.open(str(path / "whole"), map_size=1 << 28)
        values = {xxhash.xxh3_128_digest(bytes([i])): bytes([i]) * 20_000 for i in range(200)}
        with environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key + b"h", value[:400])
                transaction.put(key + b"p", value)
        with environment.begin(write=True) as transaction:
            for key in [*values][:20]:
                transaction.delete(key + b"p")
                del values[key]
        environment.close()
        raw = (path / "whole" / "data.mdb").read_bytes()
        tree = _tree_pages(raw)
        chance = random.Random(0)
        for _ in range(count):
            damaged = bytearray(raw)
            damaged[chance.choice(tree) + chance.randrange(4096)] ^= 1 << chance.randrange(8)
            (path / "data.mdb").write_bytes(damaged)
            child = os.fork()
            if not child:
                os._exit(_use_damaged(path, values))
            status = os.waitpid(child, 0)[1]
            name = "crash" if os.WIFSIGNALED(status) else ["same", "wrong", "error"][status >> 8]
            found[name] += 1
    print(json.dumps(found))
    return found


def _tree_pages(raw: bytes) -> list[int]:
    """Offsets of an environment's pages but for those of large values."""
    at, found = 0, []
    while at < len(raw):
        if raw[at + 10] & 4:  # P_OVERFLOW: its number of pages follows
            at += 4096 * int.from_bytes(raw[at + 12 : at + 16], "little")
        else:
            found.append(at)
            at += 4096
    return found


def _use_damaged(path: Path, values: dict[bytes, bytes]) -> int:
    """Exit status: 0 all as it was, 1 something is missing or wrong, 2 an lmdb.Error."""
    os.close(2)  # liblmdb's assertions
    signal.alarm(10)  # an endless loop is a crash too
    try:
        with lmdb.open(str(path), map_size=1 << 28, lock=False, sync=False) as environment:
            for _ in range(3):
                with environment.begin(write=True) as transaction:
                    transaction.put(os.urandom(16), bytes(50_000))
            with environment.begin() as transaction:
                found = {key: value for key, value in transaction.cursor() if key[16:] == b"p"}
    except lmdb.Error:
        return 2
    return 0 if found == {key + b"p": value for key, value in values.items()} else 1


def measure_hash() -> dict[str, float]:
    raw = np.random.default_rng(0).bytes(CHUNK_TOKENS * TOKEN_BYTES)
    begin = time.perf_counter()
    for _ in range(200):
        xxhash.xxh3_64_intdigest(raw)
    row = {"xxh3_64_gb_per_s": round(200 * len(raw) / (time.perf_counter() - begin) / 1e9, 1)}
    print(json.dumps(row))
    return row


def do_harm(folder: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Run tests/disk_damage.py in children, which may crash; a part of each count at a time."""
    script = Path(__file__).parents[1] / "tests" / "disk_damage.py"
    totals: dict[str, Any] = {}
    for what, count in counts.items():
        total: dict[str, float] = {}
        for seed, first in enumerate(range(0, count, 500)):
            with fresh(folder / "harm") as path:
                arguments = [what, str(min(500, count - first)), str(seed), str(path)]
                done = subprocess.run(
                    [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, check=True
                )
            for name, number in json.loads(done.stdout).items():
                total[name] = round(total.get(name, 0) + number, 3)
        totals[what] = total
        print(what, json.dumps(total))
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="hash,sizes,churn,scan,put,damage,harm")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--crash", type=int, default=20)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--truncations", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    counts = {
        "flips": arguments.flips,
        "truncations": arguments.truncations,
        "kills": arguments.crash,
    }
    measures: dict[str, Callable[[], Any]] = {
        "hash": measure_hash,
        "sizes": lambda: measure_sizes(folder),
        "churn": lambda: measure_churn(folder),
        "scan": lambda: measure_scan(folder, arguments.records),
        "put": lambda: measure_put(folder),
        "damage": lambda: measure_damage(folder, 2000),
        "harm": lambda: do_harm(folder, counts),
    }
    results = {}
    for name in arguments.only.split(","):
        print(f"# {name}")
        results[name] = measures[name]()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
