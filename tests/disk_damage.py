"""Damage to the disk tier's files: flipped bits, truncations, kill -9 under write load.

    python tests/disk_damage.py flips|truncations|kills COUNT SEED FOLDER

Prints counts as JSON. A wrong payload, a lost durable record, a refused start or a broken invariant
is an AssertionError; a crash ends this process. The tests and benchmarks/disk_tier.py run it.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import xxhash

from agentrt.cache.disk import DiskTier
from agentrt.cache.disk_writer import WriteOptions
from agentrt.cache.keys import Fingerprint, chunk_key, root_key
from agentrt.cache.tier import Record

CHUNK_TOKENS = 8
TOKEN_BYTES = 1024
QUOTA_BYTES = 1 << 30  # nothing is evicted
FINGERPRINT = Fingerprint(
    namespace="",
    model_digest="d" * 64,
    layout="test",
    dtype="float32",
    arithmetic="",
    token_bytes=TOKEN_BYTES,
)


def payload_of(key: bytes, num_bytes: int) -> bytes:
    """What a record of this key must read as: no other key has the same."""
    seed = xxhash.xxh3_64_intdigest(key)
    return np.random.Generator(np.random.PCG64(seed)).bytes(num_bytes)


def make_chain(
    name: int, num_chunks: int, tail_tokens: int = 0, fingerprint: Fingerprint = FINGERPRINT
) -> list[Record]:
    """A sequence's records; `name` is its first token, so that chains differ."""
    parent, records = root_key(fingerprint), []
    lengths = [CHUNK_TOKENS] * num_chunks + ([tail_tokens] if tail_tokens else [])
    for index, length in enumerate(lengths):
        tokens = np.full(length, index + 1, dtype=np.int32)
        tokens[0] = name
        key = chunk_key(parent, tokens)
        records.append(
            Record(
                key=key,
                parent=parent,
                token_ids=tokens,
                start=index * CHUNK_TOKENS,
                num_bytes=length * fingerprint.token_bytes,
                last_used_s=float(name),
            )
        )
        parent = key
    return records


def open_tier(folder: Path, quota_bytes: int = QUOTA_BYTES, **options: float) -> DiskTier:
    return DiskTier(
        folder,
        quota_bytes=quota_bytes,
        fingerprint=FINGERPRINT,
        clock=time.monotonic,
        options=WriteOptions(**options),
    )


def put(tier: DiskTier, record: Record) -> bool:
    return tier.put(record, [payload_of(record.key, record.num_bytes)])


def read(tier: DiskTier, record: Record) -> bool:
    """Whether it is a hit; a wrong payload is an AssertionError."""
    into = bytearray(record.num_bytes)
    if not tier.read(record, [into]):
        return False
    assert into == payload_of(record.key, record.num_bytes), f"wrong payload: {record!r}"
    return True


def verify(tier: DiskTier, wanted: dict[bytes, Record]) -> tuple[int, set[bytes]]:
    """Read all that the tier says to have: the number of hits, and those with all ancestors."""
    hits, rooted = 0, {root_key(FINGERPRINT)}
    for record in tier.scan():
        expected = wanted[record.key]
        assert expected.start == record.start
        assert record.holds(expected.parent, expected.token_ids), "foreign tokens"
        if read(tier, record):
            hits += 1
            if record.parent in rooted:
                rooted.add(record.key)
    tier.check()
    return hits, rooted


def flip(path: Path, chance: random.Random, num_bits: int) -> None:
    with path.open("r+b") as file:
        size = path.stat().st_size
        for _ in range(num_bits if size else 0):
            file.seek(position := chance.randrange(size))
            byte = file.read(1)[0] ^ (1 << chance.randrange(8))
            file.seek(position)
            file.write(bytes([byte]))


def damage(count: int, seed: int, folder: Path, *, truncate: bool) -> dict[str, float]:
    """Damage a copy of a healthy folder `count` times; open, read, write and open again."""
    chance, healthy, copy = random.Random(seed), folder / "healthy", folder / "copy"
    records = [record for name in range(8) for record in make_chain(name, 4, name % 3)]
    with open_tier(healthy) as tier:
        assert all(put(tier, record) for record in records)
    by_key = {record.key: record for record in records}
    # One that is not among them: where it lands must not disturb the others.
    (more,) = make_chain(100, 1)
    names = ["index.lmdb", "payload.kv", "index.digest"]
    found = {"runs": 0, "hits": 0, "misses": 0, "rebuilds": 0, "open_s": 0.0}
    for _ in range(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(healthy, copy)
        path = copy / chance.choices(names, [5, 5, 1])[0]
        if truncate:
            os.truncate(path, chance.randrange(path.stat().st_size))
        else:
            flip(path, chance, chance.choice([1, 1, 1, 2, 8]))
        begin = time.perf_counter()
        with open_tier(copy) as tier:
            found["open_s"] += time.perf_counter() - begin
            hits, rooted = verify(tier, by_key)
            assert put(tier, more)
            tier.flush()
            assert read(tier, more)
            found["rebuilds"] += tier.stats().rebuilds
        with open_tier(copy) as tier:
            again = verify(tier, by_key | {more.key: more})[1]
            assert again == rooted | {more.key}, f"{len(rooted)} whole, then {len(again)}"
        found["runs"] += 1
        found["hits"] += hits
        found["misses"] += len(records) - hits
    return found


def write_until_killed(folder: Path, log: Path, quota_bytes: int, seed: int) -> None:
    """Write, drop, touch and erase without end; tell `log` what must survive from then on.

    A line is `+key` once the record is durable, `-key` before it is dropped.
    """
    chance = random.Random(seed)
    is_strict = quota_bytes >= QUOTA_BYTES
    with log.open("a", buffering=1) as told:
        tier = open_tier(folder, quota_bytes, batch_bytes=200_000, batch_s=0.002)
        told.write("ready\n")
        alive: list[Record] = []
        for name in range(seed * 1000, seed * 1000 + 1000):
            chain = make_chain(name, chance.randrange(1, 8), chance.randrange(CHUNK_TOKENS))
            fresh = [record for record in chain if put(tier, record)]
            tier.touch([record.key for record in fresh[::2]], float(name))
            if chance.random() < 0.5:
                tier.flush()
                if is_strict:
                    alive += fresh
                    told.write("".join(f"+{record.key.hex()}\n" for record in fresh))
            if alive and chance.random() < 0.2:
                gone = [alive.pop().key for _ in range(min(len(alive), 3))]
                told.write("".join(f"-{key.hex()}\n" for key in gone))
                (tier.erase if chance.random() < 0.2 else tier.drop)(gone)


def kill(count: int, seed: int, folder: Path) -> dict[str, float]:
    """Kill a writer `count` times at random moments; each time nothing durable may be lost.

    Every second run has a quota that is churned through; there nothing need survive.
    """
    chance = random.Random(seed)
    found = {"kills": 0, "durable": 0, "rebuilds": 0, "open_s": 0.0, "misses": 0, "hits": 0}
    for run in range(count):
        is_strict = run % 2 == 0
        quota_bytes = QUOTA_BYTES if is_strict else 2 << 20
        store, log = folder / f"store{run % 2}", folder / f"log{run % 2}"
        if run % 20 < 2:  # a fresh folder now and then
            shutil.rmtree(store, ignore_errors=True)
            log.unlink(missing_ok=True)
        log.touch()
        size = log.stat().st_size
        child = os.fork()
        if not child:
            write_until_killed(store, log, quota_bytes, seed * 10_000 + run + 1)
            os._exit(1)
        while log.stat().st_size == size:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer ended by itself"
        durable = set()
        for line in log.read_text().splitlines():
            if line.startswith("+"):
                durable.add(line[1:])
            elif line.startswith("-"):
                durable.discard(line[1:])
        begin = time.perf_counter()
        with open_tier(store, quota_bytes) as tier:
            found["open_s"] += time.perf_counter() - begin
            assert not tier.stats().read_only, "the dead writer's lock was not taken over"
            records = tier.scan()
            whole = {record.key.hex() for record in records if read(tier, record)}
            tier.check()
            assert durable <= whole, f"{len(durable - whole)} durable records are lost"
            found["rebuilds"] += tier.stats().rebuilds
            assert tier.file_bytes() <= quota_bytes
        found["kills"] += 1
        found["durable"] += len(durable)
        found["hits"] += len(whole)
        found["misses"] += len(records) - len(whole)
    return found


def main() -> None:
    what, count, seed, folder = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    if what == "kills":
        found = kill(int(count), int(seed), Path(folder))
    else:
        found = damage(int(count), int(seed), Path(folder), truncate=what == "truncations")
    print(json.dumps(found))  # noqa: T201 - this is its output


if __name__ == "__main__":
    main()
