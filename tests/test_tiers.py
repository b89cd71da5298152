"""Engines with tiers below the device. The fake device fails on any KV that is not its token's."""

import asyncio
import random

import numpy as np
import pytest
import torch
from fakes import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    TOKEN_BYTES,
    FakeEngine,
    greedy_after,
    until,
)

from agentrt import GenerateOptions
from agentrt.cache.keys import Fingerprint, root_key
from agentrt.cache.split import Rates
from agentrt.errors import RequestInvalid, SessionBusy
from agentrt.kernels.arithmetic import arithmetic_of
from agentrt.kernels.cpu import CpuOps
from agentrt.kernels.native import Native, NativeOps

SIX = GenerateOptions(max_tokens=6, ignore_eos=True)
DISK_BYTES = 4 << 20
SLOT_BYTES = CHUNK_TOKENS * TOKEN_BYTES


def prompt(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(1, 60) for _ in range(length)]


async def settled(engine):
    """Wait until all transfers have ended and the disk has what it will take."""
    loop = engine._open.loop
    mover = loop.scheduler.mover
    await asyncio.wrap_future(loop.call(lambda: None))  # what was told before has been heard
    await until(lambda: not mover.num_in_flight)
    await asyncio.wrap_future(loop.call(mover.tiers.flush))


def cached(done):
    return dict(done.usage.cached_tokens)


class SlowCompute(Rates):
    """Loading always pays: the fake device would compute faster than any disk."""

    def note_compute(self, num_tokens, cost_tokens, seconds):
        pass


def fast_loads(engine):
    engine._open.loop.scheduler.mover.rates = SlowCompute(1.0)


async def test_what_the_device_lost_comes_from_the_host(tmp_path):
    first = prompt(1, 100)
    async with FakeEngine(num_blocks=40, host_kv_bytes=64 * SLOT_BYTES) as engine:
        fast_loads(engine)
        expected = (await engine.generate(first, SIX)).token_ids
        await settled(engine)
        await engine.generate(prompt(2, 140), SIX)  # evicts most of it
        again = await engine.generate(first, SIX)
        assert again.token_ids == expected == tuple(greedy_after(first, 6))
        counts = cached(again)
        assert counts["host"] > 50
        assert counts["disk"] == 0
        assert counts["device"] + counts["host"] >= 96
        stats = engine.stats()
        assert stats.loaded_tokens["host"] == counts["host"]
        assert stats.lower.host_bytes <= 64 * SLOT_BYTES
        await engine.check()


async def test_a_new_engine_finds_on_disk_what_an_old_one_computed(tmp_path):
    tokens = prompt(3, 90)
    for round_number in range(3):
        engine = FakeEngine(cache_dir=tmp_path, disk_kv_bytes=DISK_BYTES)
        async with engine:
            fast_loads(engine)
            done = await engine.generate(tokens, SIX)
            assert done.token_ids == tuple(greedy_after(tokens, 6))
            expected = {"device": 0, "host": 0, "disk": 89 if round_number else 0}
            assert cached(done) == expected
            await engine.check()


@pytest.mark.parametrize("disk_bytes", [0, DISK_BYTES])
async def test_only_the_tokens_decide_not_the_key(tmp_path, disk_bytes):
    """Every chunk's key collides: nothing foreign is served, and nothing breaks."""
    engine = FakeEngine(
        num_blocks=40,
        host_kv_bytes=64 * SLOT_BYTES,
        cache_dir=tmp_path,
        disk_kv_bytes=disk_bytes,
    )
    async with engine:
        fast_loads(engine)
        index = engine._open.loop.scheduler.mover.tiers._index
        index._digest = lambda data: b"0123456789abcdef"
        for seed in (1, 2, 3, 1, 2, 3):
            tokens = prompt(seed, 120)
            done = await engine.generate(tokens, SIX)
            assert done.token_ids == tuple(greedy_after(tokens, 6))
            await settled(engine)
        await engine.check()
        assert len(index) == (disk_bytes > 0)  # what was evicted begins behind a first chunk


async def test_namespaces_do_not_see_each_others_entries(tmp_path):
    tokens, found = prompt(4, 80), []
    for namespace in ("one", "two", "one"):
        engine = FakeEngine(cache_dir=tmp_path, disk_kv_bytes=DISK_BYTES, namespace=namespace)
        async with engine:
            fast_loads(engine)
            found.append(cached(await engine.generate(tokens, SIX))["disk"])
    assert found == [0, 0, 79]


async def test_erasing_leaves_no_byte_in_any_tier(tmp_path, tokenizer, template):
    engine = FakeEngine(
        num_blocks=900,
        context=3000,
        cache_dir=tmp_path,
        disk_kv_bytes=DISK_BYTES,
        host_kv_bytes=900 * SLOT_BYTES,
        step_tokens=300,
        tokenizer=tokenizer,
        template=template,
    )
    async with engine:
        session = engine.session(options=GenerateOptions(max_tokens=40))
        await session.run("my number is 4711, and nobody else's")
        ids = np.array(session.token_ids)
        await settled(engine)
        needle = ids[40:48].astype(np.int64).tobytes()  # as the fake device keeps it
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(needle in path.read_bytes() for path in files)
        await session.erase()
        assert not any(
            needle in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
        )
        host = engine._open.loop.scheduler.mover.tiers._host
        assert not any(needle in slab.tobytes() for slab in host._slabs)
        assert engine.stats().lower.num_chunks == 0


async def test_who_only_read_the_folder_writes_it_once_the_other_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("agentrt.cache.lower.TAKE_OVER_APART_S", 0.0)
    old, new = prompt(1, 90), prompt(2, 90)
    settings = {"cache_dir": tmp_path, "disk_kv_bytes": DISK_BYTES}
    writer, reader = FakeEngine(**settings), FakeEngine(**settings)
    async with writer, reader:
        assert reader.stats().lower.disk.read_only
        await writer.generate(old, SIX)
        await settled(writer)
        await reader.generate(new, SIX)
        assert reader.stats().lower.disk.written == 0
        await writer.aclose()
        fast_loads(reader)
        found = await reader.generate(old, SIX)  # what was written since it opened, too
        assert cached(found)["disk"] > 80
        await settled(reader)
        assert not reader.stats().lower.disk.read_only
        await reader.check()
    async with FakeEngine(**settings) as engine:
        fast_loads(engine)
        assert cached(await engine.generate(new, SIX))["disk"] > 80


async def test_a_folder_that_cannot_be_used_is_said_and_done_without(tmp_path, caplog):
    (tmp_path / "kv").write_text("no folder")
    async with FakeEngine(cache_dir=tmp_path, disk_kv_bytes=DISK_BYTES) as engine:
        done = await engine.generate([1, 2, 3], SIX)
        assert done.token_ids == tuple(greedy_after([1, 2, 3], 6))
        assert "kv" in engine.stats().disk_problem
    assert len([r for r in caplog.records if "without the disk tier" in r.message]) == 1


async def test_a_pause_brings_back_what_was_evicted_meanwhile(tmp_path):
    tokens = prompt(5, 100)
    async with FakeEngine(num_blocks=40, host_kv_bytes=64 * SLOT_BYTES) as engine:
        fast_loads(engine)
        log = [*tokens, *(await engine.generate(tokens, SIX)).token_ids]
        await settled(engine)
        async with engine.pause(log, "look_up"):
            await engine.generate(prompt(6, 150), SIX)
            assert engine.cache.peek(np.array(log, np.int32)) < 50
        await until(lambda: engine.cache.peek(np.array(log, np.int32)) > 95)
        await settled(engine)
        done = await engine.generate([*log, 7], SIX)
        assert cached(done)["device"] >= 104
        assert cached(done)["host"] == 0
        await engine.check()


async def test_a_tool_that_is_due_has_its_session_fetched_before_it_ends(tmp_path):
    tokens = prompt(7, 100)
    async with FakeEngine(num_blocks=40, host_kv_bytes=64 * SLOT_BYTES) as engine:
        fast_loads(engine)
        for _ in range(20):
            engine._open.loop.scheduler.pauses.latencies.observe("quick", 0.01)
        await engine.generate(tokens, SIX)
        await settled(engine)
        async with engine.pause(tokens, "quick"):
            await engine.generate(prompt(8, 150), SIX)
            await until(lambda: engine.cache.peek(np.array(tokens, np.int32)) > 90)


@pytest.mark.parametrize("disk_bytes", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
async def test_random_traffic_over_five_times_the_pool(tmp_path, seed, disk_bytes):
    """Every tier is too small for all; every answer is right and every budget holds."""
    rng = random.Random(seed)
    usages = []
    logs = [prompt(100 + i, rng.randrange(30, 60)) for i in range(24)]
    engine = FakeEngine(
        num_blocks=60,
        cache_dir=tmp_path,
        host_kv_bytes=30 * SLOT_BYTES,
        disk_kv_bytes=disk_bytes,
        max_batch=6,
        checked=seed == 0,
    )

    async def agent(log):
        for _ in range(4):
            made = GenerateOptions(max_tokens=rng.randrange(1, 9), ignore_eos=True)
            done = await engine.generate(log, made)
            assert done.token_ids == tuple(greedy_after(log, made.max_tokens))
            usages.append(done.usage)
            log += done.token_ids
            async with engine.pause(log, rng.choice(["a", "b"])):
                await asyncio.sleep(rng.choice([0, 0.001, 0.02]))
            log.append(rng.randrange(1, 60))

    async with engine:
        fast_loads(engine)
        await asyncio.gather(*(agent(list(log)) for log in logs))
        await settled(engine)
        await engine.check()
        stats = engine.stats()
        assert sum(stats.loaded_tokens.values()) > 0
        # Each prompt token has one origin, though requests are preempted and KV fetched ahead.
        assert stats.prompt_tokens == sum(usage.prompt_tokens for usage in usages)
        from_tiers = stats.cached_tokens + sum(stats.loaded_tokens.values())
        assert stats.prompt_tokens == from_tiers + stats.computed_tokens
        assert from_tiers == sum(sum(usage.cached_tokens.values()) for usage in usages)
        assert sum(stats.fetched_tokens.values()) >= sum(stats.loaded_tokens.values())
        assert stats.lower.host_bytes <= 30 * SLOT_BYTES
        if disk_bytes:
            assert await asyncio.to_thread(engine._open.disk.file_bytes) <= disk_bytes
        assert await engine.leased_blocks() == 0


def test_the_root_key_depends_on_all_that_kv_depends_on():
    texts = ("namespace", "model_digest", "layout", "dtype", "arithmetic")
    base = {**dict.fromkeys(texts, ""), "token_bytes": 4}
    keys = {root_key(Fingerprint(**base))}
    for name in texts:
        keys.add(root_key(Fingerprint(**{**base, name: "x"})))
    keys.add(root_key(Fingerprint(**{**base, "token_bytes": 8})))
    assert len(keys) == 7


def test_kv_of_other_kernels_or_machines_is_another(tmp_path, monkeypatch):
    """A folder that moves with its user must not bring KV that rounds otherwise."""
    cpu = torch.device("cpu")
    texts = [arithmetic_of(CpuOps("int8"), cpu)]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    texts.append(arithmetic_of(CpuOps("int8"), cpu))
    monkeypatch.setattr(torch, "__version__", "9.9")
    texts.append(arithmetic_of(CpuOps("int8"), cpu))
    builds = [NativeOps(Native(None, build), True) for build in ("native-1", "native-2")]
    texts += [arithmetic_of(ops, cpu) for ops in builds]
    assert len(set(texts)) == 5


LONG = GenerateOptions(max_tokens=40)


async def test_a_session_with_an_id_goes_on_after_a_restart(tmp_path, tokenizer, template):
    def engine():
        return FakeEngine(
            num_blocks=900,
            context=3000,
            step_tokens=300,
            cache_dir=tmp_path,
            disk_kv_bytes=DISK_BYTES,
            tokenizer=tokenizer,
            template=template,
        )

    async with engine() as first, first.session(id="mine", system="be kind", options=LONG) as one:
        fast_loads(first)
        await one.run("hello")
        before = one.token_ids, list(one.messages)
        with pytest.raises(SessionBusy, match="mine"):
            await first.session(id="mine").__aenter__()
        # a turn that is cut off leaves the saved one as it was
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0):
                await one.run("and then")
    async with engine() as second:
        fast_loads(second)
        async with second.session(id="mine", options=LONG) as again:
            assert (again.token_ids, again.messages) == before
            reply = await again.run("go on")
            usage = reply.steps[0].completion.usage
            assert sum(usage.cached_tokens.values()) >= len(before[0]) - 1
            assert usage.cached_tokens["disk"] > 0
            await again.erase()
        async with second.session(id="mine", options=LONG) as new:
            assert not new.token_ids
        async with second.session(id="other", options=LONG) as other:
            assert not other.messages
    files = [path for path in (tmp_path / "sessions").iterdir() if path.is_file()]
    assert not [path for path in files if b"hello" in path.read_bytes()]


async def test_a_damaged_session_file_is_a_clear_error(tmp_path, tokenizer, template):
    engine = FakeEngine(
        context=3000, num_blocks=900, cache_dir=tmp_path, tokenizer=tokenizer, template=template
    )
    async with engine:
        async with engine.session(id="mine", options=LONG) as one:
            await one.run("hello")
        (path,) = await asyncio.to_thread(lambda: list((tmp_path / "sessions").iterdir()))
        content = await asyncio.to_thread(path.read_bytes)
        await asyncio.to_thread(path.write_bytes, content[:-9])
        with pytest.raises(RequestInvalid, match="damaged"):
            await engine.session(id="mine").__aenter__()


async def test_explain_tells_where_a_prompt_left_what_was_there(tmp_path, tokenizer):
    engine = FakeEngine(
        num_blocks=120,
        context=400,
        host_kv_bytes=8 * SLOT_BYTES,
        step_tokens=300,
        tokenizer=tokenizer,
    )
    async with engine:

        async def ask(text):
            done = await engine.generate(text, GenerateOptions(max_tokens=1))
            return await engine.explain(done.request_id)

        first = await ask("It is 2026-11-24 10:31 now. " + "What a day. " * 9)
        assert (first.cause, first.first_difference, first.other_text) == ("new text", 0, None)
        same = await ask("It is 2026-11-24 10:31 now. " + "What a day. " * 9)
        assert same.cause == "nothing is missing"
        assert same.matched_tokens["device"] == same.prompt_tokens - 1
        later = await ask("It is 2026-11-24 10:32 now. " + "What a day. " * 9)
        assert later.cause == "clock in the prompt"
        assert later.first_difference == len("It is 2026-11-24 10:3")
        assert "10:32" in later.text
        assert "10:31" in later.other_text
        other = await ask("It is 2026-11-24 10:31 now. " + "What a night. " * 9)
        assert other.cause == "another text"
        await ask("x" * 250)
        await ask("y" * 350)
        gone = await ask("It is 2026-11-24 10:31 now. " + "What a day. " * 9)
        assert gone.cause == "evicted"
        with pytest.raises(RequestInvalid, match="never admitted"):
            await engine.explain("r999")


async def test_explain_tells_of_other_namespaces_and_models(tmp_path):
    tokens = prompt(9, 90)
    for namespace, cause in (("one", "new text"), ("two", "namespace")):
        engine = FakeEngine(cache_dir=tmp_path, disk_kv_bytes=DISK_BYTES, namespace=namespace)
        async with engine:
            done = await engine.generate(tokens, SIX)
            assert (await engine.explain(done.request_id)).cause == cause


async def test_forgetting_waits_for_what_is_on_its_way(tmp_path):
    """Erased right after its turn, while its KV is being saved."""
    async with FakeEngine(host_kv_bytes=64 * SLOT_BYTES, num_blocks=200) as engine:
        for seed in range(40):
            tokens = prompt(seed, 100)
            done = await engine.generate(tokens, SIX)
            await engine.forget([*tokens, *done.token_ids], erase=True)
            assert engine.stats().lower.num_chunks == 0
        await engine.check()


@pytest.mark.parametrize("disk_bytes", [0, DISK_BYTES])
async def test_the_host_holds_what_the_device_does_not(tmp_path, disk_bytes):
    """Three logs that neither tier has room for, but both together, with room to load one: without
    a disk tier, which wants all of it written, what is computed twice is cut inside a chunk."""
    engine = FakeEngine(
        num_blocks=44,
        host_kv_bytes=36 * SLOT_BYTES,
        cache_dir=tmp_path,
        disk_kv_bytes=disk_bytes,
        max_batch=1,
    )
    logs = [prompt(seed, 100) for seed in (1, 2, 3)]
    async with engine:
        fast_loads(engine)
        for log in logs * 3:
            done = await engine.generate(log, SIX)
            assert done.token_ids == tuple(greedy_after(log, 6))
            await settled(engine)
        await engine.check()
        stats = engine.stats()
        assert stats.lower.host_bytes <= 36 * SLOT_BYTES
        if not disk_bytes:
            assert stats.computed_tokens <= 300 + 9 * (BLOCK_TOKENS + CHUNK_TOKENS)
            chunks = list(engine._open.loop.scheduler.mover.tiers._index)
            held = sum(len(chunk.token_ids) for chunk in chunks if chunk.host is not None)
            assert held + stats.kv_used_bytes // TOKEN_BYTES >= 300


async def test_erasing_leaves_no_byte_of_what_was_evicted(tmp_path):
    tokens = prompt(1, 100)
    async with FakeEngine(num_blocks=40, host_kv_bytes=64 * SLOT_BYTES) as engine:
        log = [*tokens, *(await engine.generate(tokens, SIX)).token_ids]
        await engine.generate(prompt(2, 140), SIX)
        host = engine._open.loop.scheduler.mover.tiers._host
        needle = np.array(tokens[48:56]).astype(np.int64).tobytes()  # as the fake device keeps it
        assert any(needle in slab.tobytes() for slab in host._slabs)
        await engine.forget(log, erase=True)
        assert not any(needle in slab.tobytes() for slab in host._slabs)
        await engine.check()


async def test_those_whose_kv_is_in_the_host_go_before_those_who_must_compute(tmp_path):
    first = prompt(1, 100)
    engine = FakeEngine(num_blocks=40, host_kv_bytes=64 * SLOT_BYTES, max_batch=1)
    async with engine:
        fast_loads(engine)
        await engine.generate(first, SIX)
        await engine.generate(prompt(2, 140), SIX)  # the first one's KV goes to the host
        engine.gate.close()
        order = []

        async def ask(name, tokens):
            await engine.generate(tokens, SIX)
            order.append(name)

        running = asyncio.create_task(ask("running", prompt(2, 140)))
        await engine.until_held()
        others = [asyncio.create_task(ask("new", prompt(3, 100)))]
        await asyncio.sleep(0.01)
        others.append(asyncio.create_task(ask("in the host", first)))
        await until(lambda: engine._open.loop.num_queued == 3)
        await asyncio.sleep(0.05)
        engine.gate.open()
        await asyncio.gather(running, *others)
        assert order == ["running", "in the host", "new"]
