"""What an admission looks up, and when what nobody waits for is done."""

import asyncio
import random
from array import array

import numpy as np
import pytest
from fakes import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    TOKEN_BYTES,
    FakeClock,
    FakeEngine,
    greedy_after,
    until,
)

from agentrt import GenerateOptions
from agentrt.cache import PrefixCache, SessionState
from agentrt.cache.chunk import ChunkIndex
from agentrt.cache.host import HostTier
from agentrt.cache.keys import chunk_key, chunk_keys, raw_tokens
from agentrt.cache.lower import LowerTiers
from agentrt.cache.tree import RadixTree
from agentrt.explain import CHUNK_TOKENS as SEEN_TOKENS
from agentrt.explain import MAX_ADMISSIONS, Admission, Admissions
from agentrt.mover import MOST_CHUNKS
from agentrt.submission import packed

TWO = GenerateOptions(max_tokens=2, ignore_eos=True)
SLOT_BYTES = CHUNK_TOKENS * TOKEN_BYTES


def tokens(seed, length):
    rng = random.Random(seed)
    return np.array([rng.randrange(1, 60) for _ in range(length)], dtype=np.int32)


def count(monkeypatch, owner, name):
    """How often a method is called from now on."""
    real, calls = getattr(owner, name), []

    def counted(self, *arguments, **named):
        calls.append(arguments)
        return real(self, *arguments, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("host_slots", [0, 64])
async def test_each_tier_is_looked_up_once_before_the_launch(monkeypatch, host_slots):
    prompt = tokens(1, 120).tolist()
    async with FakeEngine(
        num_blocks=256, context=512, host_kv_bytes=host_slots * SLOT_BYTES, speculation=False
    ) as engine:
        await engine.generate(prompt, TWO)
        await until(lambda: engine.stats().running == 0)
        trees = count(monkeypatch, RadixTree, "match")
        chunks = count(monkeypatch, ChunkIndex, "match")
        seen = []
        engine.runner.before_step = lambda: seen.append((len(trees), len(chunks)))
        done = await engine.generate([*prompt, 7, 8, 9], TWO)
        assert done.usage.cached_tokens["device"] >= 120
        assert seen[0] == (1, int(host_slots > 0))
        assert done.token_ids == tuple(greedy_after([*prompt, 7, 8, 9], 2))


def test_a_match_is_another_version_once_its_edge_was_cut():
    cache = PrefixCache(16, BLOCK_TOKENS)
    log = tokens(2, 12)
    lease, _ = cache.acquire(log, num_tokens=13, now=0.0)
    cache.commit(lease, log, 0.0)
    cache.release(lease)
    before = cache.version
    cache.mark(log, SessionState.IDLE, 1.0)
    assert cache.version == before
    cache.mark(log[:6], SessionState.IDLE, 1.0)
    assert cache.stats().num_nodes == 2
    assert cache.version != before


def test_a_match_that_was_found_before_gives_the_same_lease():
    leases = []
    for is_given in (False, True):
        cache = PrefixCache(16, BLOCK_TOKENS)
        log = tokens(3, 10)
        first, _ = cache.acquire(log, num_tokens=11, now=0.0)
        cache.commit(first, log, 0.0)
        cache.release(first)
        longer = np.append(log, 1).astype(np.int32)
        match = cache.find(longer[:-1]) if is_given else None
        lease, copies = cache.acquire(longer, num_tokens=12, now=1.0, match=match)
        leases.append((lease.block_ids, lease.num_cached_tokens, copies))
        cache.check()
    assert leases[0] == leases[1]
    assert leases[0][1] == 10


def tiers_of(num_slots, clock):
    return LowerTiers(
        ChunkIndex(b"r" * 16, 4),
        HostTier(num_slots * 16, 16),
        None,
        token_bytes=4,
        keeps_host=True,
        clock=clock,
        wall_clock=clock,
    )


@pytest.mark.parametrize("length", [3, 8, 9, 41])
@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("num_slots", [4, 64])
def test_a_save_in_pieces_saves_what_a_whole_one_does(length, most, num_slots):
    log = tokens(4, length)
    clock = FakeClock()
    whole, pieces = tiers_of(num_slots, clock), tiers_of(num_slots, clock)
    expected = whole.begin_save(log, 0.0)
    found = []
    while True:
        behind = found[-1] if found else None
        fresh = pieces.begin_save(log, 0.0, behind=behind, most_chunks=most)
        pieces.check()
        found += fresh
        if len(fresh) < most:
            break
    assert [chunk.key for chunk in found] == [chunk.key for chunk in expected]
    assert all(chunk.num_pins == 1 for chunk in found)
    for tiers, chunks in ((whole, expected), (pieces, found)):
        tiers.end_save(chunks, copied=True)
        tiers.check()
    assert pieces.match(log).num_tokens == whole.match(log).num_tokens
    assert pieces.match(log).num_tokens == min(length, num_slots * 4)
    assert whole.stats() == pieces.stats()


def test_the_tiers_have_another_version_once_something_can_be_read_or_not():
    tiers = tiers_of(2, FakeClock())
    log, other = tokens(5, 8), tokens(6, 8)
    saved = tiers.begin_save(log, 0.0)
    begun = tiers.version
    assert tiers.match(log).num_tokens == 0
    tiers.end_save(saved, copied=True)
    assert tiers.version != begun
    read = tiers.version
    assert tiers.match(log).num_tokens == 8
    tiers.begin_save(other, 1.0)  # its slots are those of the first
    assert tiers.match(log).num_tokens < 8
    assert tiers.version != read


async def test_a_save_is_planned_in_pieces_while_nothing_comes_or_after_a_launch(monkeypatch):
    length = (2 * MOST_CHUNKS + 3) * CHUNK_TOKENS
    saves = count(monkeypatch, LowerTiers, "begin_save")
    async with FakeEngine(
        num_blocks=512, context=2048, host_kv_bytes=512 * SLOT_BYTES, step_tokens=4096
    ) as engine:
        loop = engine._open.loop
        monkeypatch.setattr(loop.scheduler.mover, "demotes", False)
        log = tokens(7, length)
        done = await engine.generate(log.tolist(), TWO)
        await until(lambda: not loop.scheduler.mover.num_in_flight)
        assert len(saves) == 3
        await engine.check()
        stored = loop.scheduler.mover.tiers.match(np.append(log, done.token_ids).astype(np.int32))
        assert stored.num_tokens >= length


async def test_what_is_not_planned_yet_is_forgotten_too(monkeypatch):
    async with FakeEngine(num_blocks=64, host_kv_bytes=64 * SLOT_BYTES) as engine:
        loop = engine._open.loop
        mover = loop.scheduler.mover
        monkeypatch.setattr(mover, "demotes", False)
        monkeypatch.setattr(type(mover), "tend", lambda self: None)  # nothing is planned by itself
        log = tokens(8, 60).tolist()
        await engine.generate(log, TWO)
        assert mover.num_in_flight == 1
        await engine.forget([*log, *greedy_after(log, 2)])
        assert mover.num_in_flight == 0
        assert mover.tiers.match(np.array(log, np.int32)).num_tokens == 0
        assert await engine.leased_blocks() == 0


async def test_what_is_not_planned_yet_is_saved_at_the_end(monkeypatch, tmp_path):
    settings = {"cache_dir": tmp_path, "disk_kv_bytes": 4 << 20}
    log = tokens(9, 90).tolist()
    async with FakeEngine(**settings) as engine:
        mover = engine._open.loop.scheduler.mover
        monkeypatch.setattr(type(mover), "tend", lambda self: None)
        await engine.generate(log, TWO)
        assert mover.num_in_flight == 1
    monkeypatch.undo()
    async with FakeEngine(**settings) as engine:
        mover = engine._open.loop.scheduler.mover
        found = await asyncio.wrap_future(
            engine._open.loop.call(lambda: mover.tiers.match(np.array(log, np.int32)).num_tokens)
        )
        assert found == 90


def test_keys_of_a_log_are_the_chain_of_its_chunks():
    log = tokens(10, 70)
    keys = chunk_keys(log, 16)
    assert len(keys) == 4
    parent = b""
    for index, key in enumerate(keys):
        parent = chunk_key(parent, log[16 * index : 16 * index + 16])
        assert key == parent
    assert chunk_keys(log[:15], 16) == []
    assert raw_tokens(log[::2]) == raw_tokens(log[::2].copy())


def noted(admissions, name, prompt, matched):
    nothing = np.empty(0, np.int32)
    facts = {"device": matched}
    admission = Admission(token_ids=prompt, matched_tokens=facts, other=nothing, is_rewritten=False)
    admissions.note(name, admission, matched)


def test_what_was_seen_counts_by_the_order_of_admissions_whenever_it_is_asked():
    admissions, prompt = Admissions(), tokens(11, 3 * SEEN_TOKENS)
    noted(admissions, "first", prompt, 0)
    noted(admissions, "again", prompt, SEEN_TOKENS)
    noted(admissions, "whole", prompt, 3 * SEEN_TOKENS - 1)
    noted(admissions, "beyond", prompt, 3 * SEEN_TOKENS)
    noted(admissions, "other", tokens(12, 3 * SEEN_TOKENS), 0)
    seen = {name: admissions.get(name).was_seen for name in ("first", "again", "whole", "beyond")}
    assert seen == {"first": False, "again": True, "whole": True, "beyond": False}
    assert not admissions.get("other").was_seen
    assert admissions.get("nobody") is None


def test_only_the_last_admissions_are_kept():
    admissions = Admissions()
    for number in range(MAX_ADMISSIONS + 3):
        noted(admissions, str(number), tokens(number, 4), 0)
    assert admissions.get("2") is None
    assert admissions.get("3") is not None


@pytest.mark.parametrize(
    "given", [[1, 2, 3], (5,), [True, 2], [1, np.int64(2)], [1, -7, 2**31 - 1]]
)
def test_a_list_of_ids_is_an_array_at_once(given):
    got = packed(given)
    if type(given[0]) is int:
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.int32
    assert np.array_equal(got, np.asarray(given))


@pytest.mark.parametrize(
    "given",
    [[], "text", [1, 2.0], [1, "2"], [1, None], [1, [2]], [2**31], [1, 1 << 70], [[1], [2]],
     array("i", [1]), np.arange(3), [1, np.array([2])]],
)  # fmt: skip
def test_whatever_else_comes_back_for_those_who_check_it(given):
    assert packed(given) is given


async def test_who_waits_for_the_blocks_of_a_save_that_is_not_planned_gets_them():
    first, second = tokens(13, 100).tolist(), tokens(14, 110).tolist()
    async with FakeEngine(
        num_blocks=32, host_kv_bytes=64 * SLOT_BYTES, eviction="lru", step_tokens=128
    ) as engine:
        mover = engine._open.loop.scheduler.mover
        assert not mover.demotes
        both = await asyncio.gather(engine.generate(first, TWO), engine.generate(second, TWO))
        for prompt, done in zip((first, second), both, strict=True):
            assert done.token_ids == tuple(greedy_after(prompt, 2))
        await until(lambda: not mover.num_in_flight)
        assert await engine.leased_blocks() == 0
        assert engine.stats().lower.saved_tokens > 0
