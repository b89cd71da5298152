import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from attrs import evolve
from disk_damage import (
    CHUNK_TOKENS,
    FINGERPRINT,
    TOKEN_BYTES,
    make_chain,
    payload_of,
    put,
    read,
)
from fakes import FakeClock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentrt.cache.disk import DiskTier
from agentrt.cache.disk_writer import MIN_QUOTA_BYTES, WriteOptions
from agentrt.cache.index_file import MIN_MAP_BYTES, IndexFile
from agentrt.cache.keys import chunk_key, root_key
from agentrt.cache.payload_file import GRAIN_BYTES, PayloadFile, checksum_of
from agentrt.cache.tier import Record
from agentrt.errors import CacheCorrupt, TierUnavailable

QUOTA_BYTES = 16 << 20
OTHER = evolve(FINGERPRINT, namespace="other")


def open_tier(folder, *, quota_bytes=QUOTA_BYTES, fingerprint=FINGERPRINT, **arguments):
    options = {key: arguments.pop(key) for key in [*arguments] if hasattr(WriteOptions(), key)}
    return DiskTier(
        folder,
        quota_bytes=quota_bytes,
        fingerprint=fingerprint,
        clock=arguments.pop("clock", FakeClock()),
        options=WriteOptions(**{"batch_s": 0.001, **options}),
        **arguments,
    )


def put_all(tier, records):
    for record in records:
        assert put(tier, record)
    tier.flush()


def keys_of(records):
    return [record.key for record in records]


def raw_bytes(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def in_child(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kv"


# Records come back.


def test_what_was_put_is_read_now_and_after_reopening(folder):
    chain = make_chain(1, 3, tail_tokens=5)
    with open_tier(folder) as tier:
        assert tier.scan() == []
        put_all(tier, chain)
        assert tier.events().written == tuple(keys_of(chain))
        assert tier.events().written == ()
        assert all(read(tier, record) for record in chain)
        tier.check()
    with open_tier(folder) as tier:
        found = tier.scan()
        assert keys_of(found) == keys_of(chain)
        assert all(a.holds(b.parent, b.token_ids) for a, b in zip(found, chain, strict=True))
        assert [record.last_used_s for record in found] == [1.0] * 4
        assert all(read(tier, record) for record in found)
        stats = tier.stats()
        assert (stats.records, stats.payload_bytes) == (4, (3 * CHUNK_TOKENS + 5) * TOKEN_BYTES)
        assert (stats.rebuilds, stats.read_only, stats.queued_bytes) == (0, False, 0)
        assert "4 records" in repr(tier)


def test_a_payload_may_come_and_go_in_many_buffers(folder):
    (record,) = make_chain(1, 1)
    whole = np.frombuffer(payload_of(record.key, record.num_bytes), np.uint8)
    parts = np.split(whole, [0, 1, 100, 5000])
    into = [np.zeros((2, 512), np.float32), bytearray(0), bytearray(record.num_bytes - 4096)]
    with open_tier(folder) as tier:
        assert tier.put(record, parts)
        tier.flush()
        assert tier.read(record, into)
    assert b"".join(bytes(memoryview(buffer).cast("B")) for buffer in into) == whole.tobytes()


def test_more_buffers_than_one_system_call_takes(folder):
    (record,) = make_chain(1, 1)
    whole = payload_of(record.key, record.num_bytes)
    into = [bytearray(4) for _ in range(record.num_bytes // 4)]
    with open_tier(folder) as tier:
        assert tier.put(record, [whole[at : at + 4] for at in range(0, len(whole), 4)])
        tier.flush()
        tier.prefetch([record])
        assert tier.read(record, into)
    assert b"".join(into) == whole


def test_buffers_of_another_size_are_an_error(folder):
    (record,) = make_chain(1, 1)
    with open_tier(folder) as tier:
        with pytest.raises(ValueError, match="9 bytes"):
            tier.put(record, [bytes(9)])
        put_all(tier, [record])
        with pytest.raises(ValueError, match="9 bytes"):
            tier.read(record, [bytearray(9)])


def test_a_second_put_costs_nothing(folder):
    chain = make_chain(1, 2)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        assert len(tier.events().written) == 2
        put_all(tier, [evolve(record, last_used_s=5.0) for record in chain])
        assert tier.events().written == tuple(keys_of(chain))
        assert tier.stats().written == 2
        assert [record.last_used_s for record in tier.scan()] == [5.0, 5.0]


def test_uses_survive_and_never_go_back(folder):
    chain = make_chain(1, 2)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        tier.touch([*keys_of(chain), b"unknown"], 7.0)
        tier.touch(keys_of(chain), 6.0)
    with open_tier(folder) as tier:
        assert [record.last_used_s for record in tier.scan()] == [7.0, 7.0]


def test_a_drop_is_for_good(folder):
    chain = make_chain(1, 3)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        tier.drop([chain[2].key, b"unknown"])
        assert not read(tier, chain[2])
    with open_tier(folder) as tier:
        assert keys_of(tier.scan()) == keys_of(chain[:2])
        assert tier.events().dropped == ()


def test_a_drop_overtakes_the_write(folder):
    (record,) = make_chain(1, 1)
    with open_tier(folder, batch_s=10.0) as tier:
        assert put(tier, record)
        assert not read(tier, record)  # not written yet: a miss
        tier.drop([record.key])
        tier.flush()
        assert (tier.events().written, tier.stats().records) == ((), 0)
        tier.check()


# What is not ours, not whole, or not the same.


def test_colliding_keys_serve_nobody_foreign_tokens(folder):
    def collide(_: bytes) -> bytes:
        return b"same for all...."

    tokens = [np.array([number], np.int32) for number in (1, 2)]
    one, other = (
        Record(
            key=chunk_key(root_key(FINGERPRINT), ids, collide),
            parent=root_key(FINGERPRINT),
            token_ids=ids,
            start=0,
            num_bytes=4,
            last_used_s=0.0,
        )
        for ids in tokens
    )
    assert one.key == other.key
    with open_tier(folder) as tier:
        assert tier.put(one, [b"1111"])
        assert not tier.put(other, [b"2222"])
        tier.flush()
        assert not tier.put(other, [b"2222"])
        into = bytearray(4)
        assert not tier.read(other, [into])
        assert tier.read(one, [into])
        assert into == b"1111"
        assert tier.stats().refused == 2


def test_a_namespace_does_not_see_another(folder):
    theirs = make_chain(1, 2, fingerprint=OTHER)
    with open_tier(folder, fingerprint=OTHER) as tier:
        put_all(tier, theirs)
    with open_tier(folder) as tier:
        put_all(tier, make_chain(1, 3))
        assert tier.stats().records == 5
        assert keys_of(tier.scan()) == keys_of(make_chain(1, 3))
    with open_tier(folder, fingerprint=OTHER) as tier:
        assert keys_of(tier.scan()) == keys_of(theirs)


def test_contents_are_told_by_fingerprint(folder):
    with open_tier(folder, fingerprint=OTHER) as tier:
        put_all(tier, make_chain(1, 3, fingerprint=OTHER))
    with open_tier(folder) as tier:
        put_all(tier, make_chain(7, 1))
        theirs, own = tier.contents()
        assert (theirs.fingerprint, theirs.records, theirs.last_used_s) == (OTHER, 3, 1.0)
        assert (own.fingerprint, own.payload_bytes) == (FINGERPRINT, CHUNK_TOKENS * TOKEN_BYTES)


def test_a_record_without_its_parent_is_refused(folder):
    chain = make_chain(1, 2)
    with open_tier(folder) as tier:
        assert not put(tier, chain[1])
        assert put(tier, chain[0])
        assert put(tier, chain[1])  # the parent need not be written yet
        tier.flush()
        assert keys_of(tier.scan()) == keys_of(chain)


def test_orphans_are_dropped_and_counted(folder):
    chain = make_chain(1, 4)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        tier.drop([chain[1].key])
    with open_tier(folder) as tier:
        assert keys_of(tier.scan()) == keys_of(chain[:1])
        assert tier.stats().dropped_orphans == 2
    with open_tier(folder) as tier:
        assert tier.stats().records == 1


def test_a_child_must_begin_where_its_parent_ends(folder):
    tail, whole = make_chain(1, 0, tail_tokens=3)[0], make_chain(1, 2)[1]
    with open_tier(folder) as tier:
        put_all(tier, [tail, evolve(whole, parent=tail.key)])
        assert keys_of(tier.scan()) == [tail.key]


def test_a_corrupt_payload_is_a_miss_and_is_told(folder):
    chain = make_chain(1, 2)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        tier.events()
        raw = bytearray((folder / "payload.kv").read_bytes())
        at = raw.find(payload_of(chain[1].key, 64))
        raw[at + 17] ^= 4
        (folder / "payload.kv").write_bytes(raw)
        assert read(tier, chain[0])
        assert not read(tier, chain[1])
        assert tier.events().dropped == (chain[1].key,)
        assert tier.stats().dropped_corrupt == 1
        assert put(tier, chain[1])
        tier.flush()
        assert read(tier, chain[1])


def test_a_file_cut_under_an_open_tier_is_misses(folder):
    chain = make_chain(1, 3)
    with open_tier(folder) as tier:
        put_all(tier, chain)
        os.truncate(folder / "payload.kv", 2 * GRAIN_BYTES)
        os.truncate(folder / "index.lmdb", 100)  # liblmdb has it mapped
        assert [read(tier, record) for record in chain] == [True, False, False]
        put_all(tier, chain)
        assert all(read(tier, record) for record in chain)
        assert tier.stats().rebuilds == 1
    with open_tier(folder) as tier:
        assert len(tier.scan()) == 3
        assert tier.stats().rebuilds == 0


def test_a_lost_index_is_made_anew(folder):
    chain = make_chain(1, 3)
    with open_tier(folder) as tier:
        put_all(tier, chain)
    (folder / "index.lmdb").unlink()
    with open_tier(folder) as tier:
        assert keys_of(tier.scan()) == keys_of(chain)
        assert tier.stats().rebuilds == 1
        tier.flush()
    with open_tier(folder) as tier:
        assert keys_of(tier.scan()) == keys_of(chain)
        assert tier.stats().rebuilds == 0


def test_a_removed_folder_costs_the_records_only(folder):
    with open_tier(folder) as tier:
        put_all(tier, make_chain(1, 2))
        shutil.rmtree(folder)
        assert put(tier, make_chain(2, 1)[0])
        tier.flush()
        stats = tier.stats()
        assert (stats.write_errors, tier.file_bytes()) == (1, 0)
        tier.check()


@pytest.mark.parametrize("content", [b"my diary, page 1: dear diary", b"\0" * 50_000])
def test_a_foreign_file_is_left_alone(folder, content):
    folder.mkdir()
    (folder / "payload.kv").write_bytes(content)
    with pytest.raises(TierUnavailable, match=r"not written by agentrt.*another cache_dir"):
        open_tier(folder)
    assert (folder / "payload.kv").read_bytes() == content


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierUnavailable, match="disk_kv_bytes=0"):
        open_tier(tmp_path / "file")
    for name in ("lock", "payload.kv"):
        (tmp_path / "kv" / name).mkdir(parents=True)
        with pytest.raises(TierUnavailable, match=name):
            open_tier(tmp_path / "kv")
        (tmp_path / "kv" / name).rmdir()
    with open_tier(tmp_path / "kv") as tier:  # nothing was left locked
        assert not tier.stats().read_only


def test_the_folder_is_the_users_own(folder):
    folder.mkdir(mode=0o755)
    with open_tier(folder) as tier:
        put_all(tier, make_chain(1, 1))
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


# Quota and eviction.


def test_files_never_pass_the_quota(folder):
    quota_bytes = MIN_QUOTA_BYTES
    with open_tier(folder, quota_bytes=quota_bytes, batch_bytes=60_000) as tier:
        for name in range(60):
            for record in make_chain(name, 3, tail_tokens=name % CHUNK_TOKENS):
                assert put(tier, record)
                assert tier.file_bytes() <= quota_bytes
            if name % 5 == 0:
                tier.flush()
                tier.check()
        tier.flush()
        stats = tier.stats()
        assert stats.evicted > 0
        assert tier.file_bytes() > quota_bytes // 2
        assert stats.write_errors == 0
        last = make_chain(59, 3, tail_tokens=59 % CHUNK_TOKENS)
        assert all(read(tier, record) for record in last)


def test_a_smaller_quota_is_kept_from_the_start(folder):
    with open_tier(folder) as tier:
        put_all(tier, [record for name in range(100) for record in make_chain(name, 2)])
        assert tier.file_bytes() > 2 << 20
    with open_tier(folder, quota_bytes=2 << 20) as tier:
        assert tier.file_bytes() <= 2 << 20
        assert tier.stats().evicted > 0
        records = tier.scan()
        assert records
        assert all(read(tier, record) for record in records)
        tier.check()


def test_what_can_never_fit_is_refused_and_evicts_nothing(folder):
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as tier:
        put_all(tier, make_chain(1, 2))
        huge = evolve(make_chain(2, 1)[0], num_bytes=MIN_QUOTA_BYTES)
        assert not tier.put(huge, [bytes(MIN_QUOTA_BYTES)])
        assert (tier.stats().refused, tier.stats().records) == (1, 2)
    with pytest.raises(ValueError, match="quota_bytes"):
        open_tier(folder, quota_bytes=MIN_QUOTA_BYTES - 1)


def fill(tier, name):
    """Put records, `name` and on, until one is evicted."""
    while not tier.stats().evicted:
        put_all(tier, make_chain(name, 1))
        name += 1


def test_the_least_recently_used_leaf_goes_first(folder):
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as tier:
        old, used = make_chain(1, 2), make_chain(2, 2)
        put_all(tier, old + used)
        tier.touch(keys_of(old), 1e6)
        fill(tier, 10)
        assert tier.events().dropped[0] == used[1].key
        assert all(read(tier, record) for record in [*old, used[0]])


def test_other_fingerprints_go_before_own_records(folder):
    theirs = make_chain(1_000_000, 2, fingerprint=OTHER)  # used last
    with open_tier(folder, fingerprint=OTHER) as tier:
        put_all(tier, theirs)
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as tier:
        fill(tier, 10)
        assert tier.events().dropped == (theirs[1].key,)
        assert tier.stats().dropped_foreign == 1


def test_the_owner_says_what_to_evict(folder):
    asked, chains = [], {}

    def victims(num_bytes):
        asked.append(num_bytes)
        # The parent of the record that room is made for is never taken, whoever names it.
        return [chains[20][1].key, chains[5][1].key, b"unknown"]

    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES, victims=victims) as tier:
        for name in range(1000):
            chains[name] = make_chain(name, 2)
            put_all(tier, chains[name][:1])
            if name == 20:
                tier.drop(keys_of(chains[0]))
            put_all(tier, chains[name][1:])
            if tier.stats().evicted:
                break
        assert asked == [CHUNK_TOKENS * TOKEN_BYTES]
        assert set(tier.events().dropped) == {chains[20][1].key, chains[5][1].key}


def test_an_owner_without_victims_is_refused(folder):
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES, victims=lambda num_bytes: ()) as tier:
        results = [put(tier, make_chain(name, 1)[0]) for name in range(100)]
        assert not all(results)
        tier.flush()
        assert (tier.stats().evicted, tier.stats().refused) == (0, results.count(False))


def test_a_chain_does_not_eat_itself(folder):
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as tier:
        chain = make_chain(1, 200)
        results = [put(tier, record) for record in chain]
        tier.flush()
        num_kept = results.index(False)
        assert not any(results[num_kept:])
        assert keys_of(tier.scan()) == keys_of(chain[:num_kept])


def test_the_index_grows_at_the_payloads_cost(folder):
    fingerprint = evolve(FINGERPRINT, token_bytes=1)
    quota_bytes = 8 << 20
    with open_tier(folder, quota_bytes=quota_bytes, fingerprint=fingerprint) as tier:
        # Each of over 2,000 tokens, a byte of payload each: the index is half of it all.
        for name in range(1000):
            tokens = np.full(2100, name, np.int32)
            root = root_key(fingerprint)
            record = Record(
                key=chunk_key(root, tokens), parent=root, token_ids=tokens, start=0,
                num_bytes=2100, last_used_s=float(name),
            )  # fmt: skip
            assert tier.put(record, [bytes(2100)])
            if name % 50 == 0:
                tier.flush()
                assert tier.file_bytes() <= quota_bytes
        tier.flush()
        tier.check()
        stats = tier.stats()
        assert stats.write_errors == 0
        assert (folder / "index.lmdb").stat().st_size > 4 * MIN_MAP_BYTES
        assert stats.records > 150
        assert tier.file_bytes() <= quota_bytes
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES, fingerprint=fingerprint) as tier:
        assert tier.file_bytes() <= MIN_QUOTA_BYTES
        tier.flush()
        tier.check()
        assert 0 < len(tier.scan()) < 60
        assert all(tier.verify())
        assert tier.file_bytes() <= MIN_QUOTA_BYTES


# Erase.


def test_erased_bytes_are_in_no_file(folder):
    secret, other = make_chain(0x5EC4E7, 3, tail_tokens=2), make_chain(2, 3)
    needles = [payload_of(record.key, record.num_bytes)[:32] for record in secret]
    needles += [record.token_ids.tobytes() for record in secret] + keys_of(secret)
    with open_tier(folder) as tier:
        put_all(tier, secret)
        tier.drop([secret[3].key])  # its bytes stay, for now
        put_all(tier, other)
        assert any(needle in raw_bytes(folder) for needle in needles)
        tier.erase(keys_of(secret))
        tier.flush()
        assert not [needle for needle in needles if needle in raw_bytes(folder)]
        assert all(read(tier, record) for record in other)
        assert not any(read(tier, record) for record in secret)
        tier.check()
    assert not [needle for needle in needles if needle in raw_bytes(folder)]
    (folder / "index.digest").unlink()
    with open_tier(folder) as tier:
        assert keys_of(tier.scan()) == keys_of(other)


def test_what_waits_to_be_written_is_erased_too(folder):
    (record,) = make_chain(3, 1)
    with open_tier(folder, batch_s=10.0) as tier:
        assert put(tier, record)
        tier.erase([record.key])
        tier.flush()
        assert payload_of(record.key, 32) not in raw_bytes(folder)
        assert tier.stats().records == 0


# Two tiers in one folder.


def test_a_second_tier_of_the_process_reads(folder):
    chain, more = make_chain(1, 3), make_chain(2, 1)
    with open_tier(folder) as writer:
        put_all(writer, chain)
        with open_tier(folder) as reader:
            assert keys_of(reader.scan()) == keys_of(chain)
            assert all(read(reader, record) for record in chain)
            assert not put(reader, more[0])
            reader.touch(keys_of(chain), 50.0)
            reader.drop([chain[2].key])
            reader.flush()
            assert (reader.stats().refused, reader.stats().read_only) == (1, True)
            assert "read-only" in repr(reader)
            reader.check()
            with pytest.raises(TierUnavailable, match="another engine"):
                reader.erase(keys_of(chain))
        assert all(read(writer, record) for record in chain)
    with open_tier(folder) as tier:  # the lock is free again
        assert put(tier, more[0])


def test_a_reader_takes_over_from_a_writer_that_is_gone(folder):
    chain, more = make_chain(1, 2), make_chain(2, 2)
    writer = open_tier(folder)
    put_all(writer, chain)
    with open_tier(folder) as reader:
        put_all(writer, more)
        assert not writer.take_over()
        assert not reader.take_over()
        assert not read(reader, more[0])  # written since
        writer.close()
        assert reader.take_over()
        assert {record.key for record in reader.scan()} == {*keys_of(chain), *keys_of(more)}
        assert all(read(reader, record) for record in [*chain, *more])
        put_all(reader, make_chain(3, 1))
        assert not reader.stats().read_only
        assert not reader.take_over()
    assert not reader.take_over()


def test_what_the_writer_overwrote_is_a_miss_for_a_reader(folder):
    chain = make_chain(1, 3)
    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as writer:
        put_all(writer, chain)
        with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES) as reader:
            reader.scan()
            for name in range(2, 100):
                put_all(writer, make_chain(name, 1))
            assert not any(read(reader, record) for record in chain)
            assert reader.events().dropped == tuple(keys_of(chain))
            assert reader.stats().dropped_corrupt == 0


CHILD = """
import sys
from disk_damage import *
with open_tier(Path(sys.argv[1])) as tier:
    records = tier.scan()
    print(len(records), sum(read(tier, record) for record in records), tier.stats().read_only)
"""


def test_a_second_process_reads_while_the_first_writes(folder):
    with open_tier(folder) as tier:
        put_all(tier, make_chain(1, 5))
        assert in_child(CHILD, folder) == "5 5 True"
    assert in_child(CHILD, folder) == "5 5 False"


def test_a_reader_without_a_fitting_index_walks(folder):
    chain = make_chain(1, 3)
    with open_tier(folder) as writer:
        put_all(writer, chain)
        (folder / "index.digest").write_bytes(b"")
        with open_tier(folder) as reader:
            assert keys_of(reader.scan()) == keys_of(chain)
            assert reader.stats().rebuilds == 1


# The writer: never in the way, and never beaten.


class Valve:
    """Holds the writer's thread in its sync of the payload."""

    def __init__(self, monkeypatch):
        self.closed, self.reached = threading.Event(), threading.Event()
        self.go = threading.Event()
        sync = PayloadFile.sync

        def held(file):
            self.reached.set()
            assert self.go.wait(10)
            sync(file)

        monkeypatch.setattr(PayloadFile, "sync", held)


def test_put_does_not_wait_and_the_queue_is_bounded(folder, monkeypatch):
    valve = Valve(monkeypatch)
    records = [make_chain(name, 1)[0] for name in range(6)]
    size = records[0].num_bytes
    with open_tier(folder, queue_bytes=3 * size, batch_bytes=1) as tier:
        assert put(tier, records[0])
        assert valve.reached.wait(10)
        results = [put(tier, record) for record in records[1:]]
        assert results == [True, True, False, False, False]
        assert tier.stats().queued_bytes == 3 * size
        assert not read(tier, records[0])
        valve.go.set()
        tier.flush()
        assert tier.stats().queued_bytes == 0
        assert [read(tier, record) for record in records] == [True] * 3 + [False] * 3
        put_all(tier, records)


def failing_after(count, call):
    """`call`, but the disk is full from its `count`-th use on."""
    left = [count]

    def maybe(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*arguments)

    return maybe


@pytest.mark.parametrize("target", ["pwritev", "fdatasync", "apply", "digest", "open"])
@pytest.mark.parametrize("count", range(4))
def test_a_full_disk_at_every_write_is_survived(folder, monkeypatch, target, count):
    clock = FakeClock()
    chains = [make_chain(name, 2) for name in range(6)]
    with open_tier(folder, clock=clock, retry_s=30.0) as tier:
        put_all(tier, chains[0])
        with monkeypatch.context() as patch:
            where, name = {
                "pwritev": (os, "pwritev"),
                "fdatasync": (os, "fdatasync"),
                "apply": (IndexFile, "apply"),
                "digest": (IndexFile, "_write_digest"),
                "open": (IndexFile, "is_intact"),
            }[target]
            patch.setattr(where, name, failing_after(count, getattr(where, name)))
            taken = []
            for chain in chains[1:]:
                taken += [record.key for record in chain if put(tier, record)]
                tier.flush()
        stats = tier.stats()
        assert stats.write_errors >= 1
        assert stats.queued_bytes == 0
        assert not put(tier, make_chain(99, 1)[0])  # it rests
        events = tier.events()
        assert taken
        assert {*events.written, *events.dropped} == {*taken, *keys_of(chains[0])}
        assert all(read(tier, record) for record in chains[0])
        clock.now += 31.0
        put_all(tier, [record for chain in chains for record in chain])
        assert all(read(tier, record) for chain in chains for record in chain)
        tier.check()
    with open_tier(folder) as tier:
        assert len(tier.scan()) == 12


def test_an_lmdb_error_is_a_write_error(folder, monkeypatch):
    clock = FakeClock()

    def broken(*_):
        raise lmdb.DiskError("no")

    with open_tier(folder, clock=clock) as tier:
        put_all(tier, make_chain(1, 1))
        with monkeypatch.context() as patch:
            patch.setattr(IndexFile, "apply", broken)
            put_all(tier, make_chain(2, 1))
        assert tier.events().dropped == (make_chain(2, 1)[0].key,)
        # What was durable is so without its index as well.
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy)
        with open_tier(copy) as other:
            assert make_chain(1, 1)[0].key in keys_of(other.scan())
        clock.now += 31.0
        put_all(tier, make_chain(2, 1))
    with open_tier(folder) as tier:
        assert len(tier.scan()) == 2
        assert tier.stats().rebuilds == 0


FULL = """
import json, resource, sys
from disk_damage import *
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
with open_tier(Path(sys.argv[1]), batch_s=0.001, retry_s=0.0) as tier:
    for name in range(60):
        for record in make_chain(name, 2):
            put(tier, record)
        tier.flush()
    hits = sum(read(tier, record) for record in tier.scan())
    print(json.dumps([hits, tier.stats().write_errors]))
"""


def test_a_real_limit_on_files_is_survived(folder):
    hits, errors = json.loads(in_child(FULL, folder))
    assert errors > 0
    assert hits > 5
    with open_tier(folder) as tier:
        assert sum(read(tier, record) for record in tier.scan()) == hits
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_bug_in_the_writer_reaches_who_waits(folder, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    tier = open_tier(folder)
    put_all(tier, make_chain(1, 1))
    monkeypatch.setattr(PayloadFile, "write", broken)
    assert put(tier, make_chain(2, 1)[0])
    with pytest.raises(CacheCorrupt) as caught:
        tier.flush()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(CacheCorrupt):
        tier.check()
    assert not put(tier, make_chain(3, 1)[0])
    assert read(tier, make_chain(1, 1)[0])
    tier.close()


@pytest.mark.parametrize("moment", ["before the checksum", "after it", "at the write"])
def test_buffers_that_change_once_the_owner_let_go_are_misses_at_most(folder, monkeypatch, moment):
    (record,) = make_chain(1, 1)
    buffer = bytearray(payload_of(record.key, record.num_bytes))
    write = PayloadFile.write
    with open_tier(folder) as tier, monkeypatch.context() as patch:

        def let_go():
            tier.drop([record.key])
            buffer[:] = bytes(len(buffer))

        def checksum(buffers):
            if moment == "before the checksum":
                let_go()
            found = checksum_of(buffers)
            if moment == "after it":
                let_go()
            return found

        def write_later(*arguments):
            if moment == "at the write":
                let_go()
            write(*arguments)

        patch.setattr("agentrt.cache.disk_writer.checksum_of", checksum)
        patch.setattr(PayloadFile, "write", write_later)
        assert tier.put(record, [buffer])
        tier.flush()
        assert buffer == bytes(len(buffer))
        assert not read(tier, record)
    (folder / "index.digest").unlink()
    with open_tier(folder) as tier:  # finds what is in the payload file, whoever dropped it
        assert all(not read(tier, found) for found in [*tier.scan(), record])


def test_old_news_is_not_told_of_a_record_that_was_put_again(folder):
    (record,) = make_chain(1, 1)
    with open_tier(folder, batch_s=100.0) as tier:
        put_all(tier, [record])
        tier.drop([record.key])
        assert put(tier, record)
        assert tier.events().written == ()  # that was of the first
        tier.flush()
        assert tier.events().written == (record.key,)


def test_closing_writes_what_is_queued(folder):
    tier = open_tier(folder, batch_s=100.0)
    (record,) = make_chain(1, 1)
    assert put(tier, record)
    tier.close()
    tier.close()
    assert not put(tier, make_chain(2, 1)[0])
    assert not read(tier, record)
    tier.flush()
    assert "closed" in repr(tier)
    with open_tier(folder) as tier:
        assert read(tier, record)


def test_verify_reads_everything(folder):
    theirs = make_chain(7, 1, fingerprint=OTHER)
    with open_tier(folder, fingerprint=OTHER) as tier:
        put_all(tier, theirs)
    with open_tier(folder) as tier:
        put_all(tier, make_chain(1, 3))
        raw = bytearray((folder / "payload.kv").read_bytes())
        raw[raw.find(payload_of(theirs[0].key, 64))] ^= 1
        (folder / "payload.kv").write_bytes(raw)
        assert sorted(tier.verify()) == [False, True, True, True]
        assert list(tier.verify()) == [True] * 3


def test_readers_and_writer_at_once(folder):
    """Reads from two threads while records are evicted and written over: right or a miss."""
    chains = [make_chain(name, 2) for name in range(200)]
    wrong: list[BaseException] = []
    done = threading.Event()

    def read_all(tier):
        try:
            while not done.is_set():
                for chain in chains:
                    for record in chain:
                        read(tier, record)
        except BaseException as exc:
            wrong.append(exc)

    with open_tier(folder, quota_bytes=MIN_QUOTA_BYTES, batch_bytes=40_000) as tier:
        threads = [threading.Thread(target=read_all, args=(tier,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.0
        while time.monotonic() < end and not wrong:
            for chain in chains:
                for record in chain:
                    put(tier, record)
        done.set()
        for thread in threads:
            thread.join()
        tier.flush()
        tier.check()
        assert not wrong
        assert tier.stats().dropped_corrupt == 0


class DiskTierMachine(RuleBasedStateMachine):
    """A tier against a dict of what it must have; it is abandoned, copied and reopened."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="disk-tier-"))
        self.num_opened = 0
        self.clock = FakeClock()
        self.durable: dict[bytes, Record] = {}
        self.erased: dict[bytes, Record] = {}
        self.waiting: dict[bytes, Record] = {}
        self.tier = open_tier(self.folder, quota_bytes=MIN_QUOTA_BYTES, clock=self.clock)

    @property
    def folder(self):
        return self.root / str(self.num_opened)

    def teardown(self):
        self.tier.close()
        shutil.rmtree(self.root)

    def poll(self):
        events = self.tier.events()
        for key in events.written:
            if key in self.waiting:
                self.durable[key] = self.waiting.pop(key)
        for key in events.dropped:
            self.durable.pop(key, None)
            self.waiting.pop(key, None)

    def forget(self, records):
        for record in records:
            self.durable.pop(record.key, None)
            self.waiting.pop(record.key, None)

    @rule(name=st.integers(0, 12), chunks=st.integers(1, 5), tail=st.integers(0, 7))
    def put(self, name, chunks, tail):
        self.clock.now += 1
        for record in make_chain(name, chunks, tail):
            record = evolve(record, last_used_s=self.clock.now)
            if not put(self.tier, record):
                break
            if record.key not in self.durable:
                self.waiting[record.key] = record
            self.erased.pop(record.key, None)

    @rule()
    def flush(self):
        self.tier.flush()
        self.poll()
        assert not self.waiting
        raw = raw_bytes(self.folder)
        for record in self.erased.values():
            assert payload_of(record.key, 32) not in raw
            assert record.key not in raw

    @rule(name=st.integers(0, 12), now=st.integers(0, 100))
    def touch(self, name, now):
        self.tier.touch(keys_of(make_chain(name, 3)), float(now))

    @rule(name=st.integers(0, 12), first=st.integers(0, 4), erase=st.booleans())
    def drop(self, name, first, erase):
        gone = [
            record
            for tail in range(CHUNK_TOKENS)
            for record in make_chain(name, 5, tail)[first:]
            + [r for n in range(first, 5) for r in make_chain(name, n, tail)[n:]]
        ]
        self.poll()
        self.forget(gone)
        if erase:
            self.tier.erase(keys_of(gone))
            self.erased.update((record.key, record) for record in gone)
        else:
            self.tier.drop(keys_of(gone))

    @rule(loses_index=st.booleans())
    def crash(self, loses_index):
        """What a killed process leaves, taken while the writer may be at work."""
        self.flush()
        copy = self.root / str(self.num_opened + 1)
        shutil.copytree(self.folder, copy)
        self.tier.close()
        shutil.rmtree(self.folder)
        self.num_opened += 1
        if loses_index:
            (copy / "index.digest").unlink(missing_ok=True)
        self.reopen()

    @rule()
    def close(self):
        self.tier.close()
        self.poll()
        self.reopen()

    def reopen(self):
        self.tier = open_tier(self.folder, quota_bytes=MIN_QUOTA_BYTES, clock=self.clock)
        found = {record.key: record for record in self.tier.scan()}
        assert found.keys() >= self.durable.keys()
        assert not found.keys() & self.erased.keys()
        # What was dropped may come back with a lost index; it is as good as it was.
        self.durable = {key: record for key, record in found.items() if read(self.tier, record)}
        assert len(self.durable) >= len(found) - len(self.tier.events().dropped)
        self.waiting = {}

    @precondition(lambda self: not self.waiting)
    @rule()
    def everything_durable_is_there(self):
        self.poll()
        assert all(read(self.tier, record) for record in self.durable.values())
        assert keys_of(self.tier.scan()) or not self.durable

    @invariant()
    def books_agree(self):
        self.tier.check()
        assert self.tier.file_bytes() <= MIN_QUOTA_BYTES
        assert self.tier.stats().write_errors == 0


DiskTierMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
test_the_tier_is_a_dict_on_disk = DiskTierMachine.TestCase
