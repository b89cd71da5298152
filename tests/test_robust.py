"""Whatever callers do, and whenever: no block leaks, nobody hangs, memory stays flat."""

import asyncio
import json
import random
import threading
from contextlib import aclosing

import psutil
import pytest
from fakes import FakeEngine, logits_after, until
from scripted import Script

from agentrt import Engine, EngineConfig, GenerateOptions, tool
from agentrt.errors import AgentrtError, EngineClosed, RequestInvalid

NUM_OPERATIONS = 10_000
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SIX = GenerateOptions(max_tokens=6, ignore_eos=True)


# ---- random operations


class Crowd:
    """Callers that do anything at any time; every task that they start is kept and awaited."""

    def __init__(self, engine, seed):
        self.engine, self.rng = engine, random.Random(seed)
        self.trunk = [self.rng.randrange(3, 259) for _ in range(60)]
        self.tasks, self.sessions = [], []
        self.num_right = 0

    async def operate(self):
        choices = {
            self.submit: 30, self.cancel: 22, self.read_a_little: 8, self.sample_several: 2,
            self.open_session: 4, self.turn: 10, self.fork: 6, self.erase: 6, self.close: 4,
            self.forget: 3, self.pause: 5,
        }  # fmt: skip
        (operation,) = self.rng.choices([*choices], [*choices.values()])
        await operation()
        while len(self.tasks) > 40:
            await self.settle(self.tasks.pop(0))

    def start(self, coroutine):
        self.tasks.append(asyncio.create_task(coroutine))

    async def settle(self, task):
        """A task ends as it should: with its value, its own cancelling, or a clear error."""
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            assert isinstance(task.exception(), AgentrtError), task.exception()

    def prompt(self):
        own = [self.rng.randrange(3, 259) for _ in range(self.rng.randrange(1, 9))]
        return self.trunk[: self.rng.randrange(60)] + own

    async def submit(self):
        prompt = self.prompt()
        num = self.rng.choice([1, 4, 8, 40])
        self.start(self.generate(prompt, num))

    async def generate(self, prompt, num):
        made = GenerateOptions(max_tokens=num, ignore_eos=True)
        done = await self.engine.generate(prompt, made)
        tokens = list(prompt)
        for token in done.token_ids:
            assert token == int(logits_after(tokens, 259).argmax())
            tokens.append(token)
        self.num_right += 1

    async def sample_several(self):
        made = GenerateOptions(max_tokens=5, n=3, temperature=1.0)
        self.start(self.engine.generate(self.prompt(), made))

    async def read_a_little(self):
        async def read(num):
            stream = self.engine.stream(self.prompt(), GenerateOptions(max_tokens=12))
            async with aclosing(stream) as events:
                async for _ in events:
                    num -= 1
                    if num <= 0:
                        break

        self.start(read(self.rng.randrange(1, 6)))

    async def cancel(self):
        if self.tasks:
            self.rng.choice(self.tasks).cancel()

    async def open_session(self):
        if len(self.sessions) < 12:
            self.sessions.append(self.engine.session(options=GenerateOptions(max_tokens=8)))

    async def turn(self):
        if self.sessions:
            self.start(self.rng.choice(self.sessions).run("x" * self.rng.randrange(20)))

    async def fork(self):
        if not self.sessions:
            return
        parent = self.rng.choice(self.sessions)

        async def fork():
            children = await parent.fork(self.rng.randrange(1, 3))
            self.sessions += children[: max(0, 12 - len(self.sessions))]

        self.start(fork())

    async def erase(self):
        if self.sessions:
            self.start(self.rng.choice(self.sessions).erase())

    async def close(self):
        if self.sessions:
            index = self.rng.randrange(len(self.sessions))
            await self.sessions.pop(index).__aexit__(None, None, None)

    async def forget(self):
        self.start(self.engine.forget(self.trunk, keep_tokens=self.rng.randrange(40)))

    async def pause(self):
        await asyncio.sleep(self.rng.choice([0, 0, 0.001]))


@pytest.mark.asyncio(loop_factories=["default"])
async def test_ten_thousand_random_operations(tokenizer, template):
    engine = FakeEngine(
        num_blocks=70, context=250, max_batch=10, step_tokens=24, checked=False,
        tokenizer=tokenizer, template=template,
    )  # fmt: skip
    async with engine:
        crowd = Crowd(engine, seed=2024)
        for number in range(NUM_OPERATIONS):
            await crowd.operate()
            if number % 50 == 0:
                await engine.check()
        for task in crowd.tasks[::2]:
            task.cancel()
        async with asyncio.timeout(60):
            for task in crowd.tasks:
                await crowd.settle(task)
        assert await engine.leased_blocks() == 0
        stats = engine.stats()
        assert stats.running == stats.waiting == 0
        # it was no calm day
        assert crowd.num_right > 500
        assert stats.cancelled > 200
        assert stats.preempted > 0
        assert stats.evicted_tokens > 0
        assert engine.runner.num_copies > 100
        await engine.generate([5, 6, 7], SIX)


async def test_closing_under_load_hangs_nobody(tokenizer, template):
    engine = FakeEngine(num_blocks=120, context=400, tokenizer=tokenizer, template=template)
    await engine.__aenter__()
    crowd = Crowd(engine, seed=7)
    for _ in range(60):
        await crowd.operate()
    await engine.aclose()
    async with asyncio.timeout(60):
        for task in crowd.tasks:
            await crowd.settle(task)
    for operation in (crowd.submit, crowd.turn, crowd.erase, crowd.read_a_little):
        await operation()
    async with asyncio.timeout(60):
        for task in crowd.tasks:
            await crowd.settle(task)
    assert isinstance(crowd.tasks[-1].exception(), EngineClosed)


# ---- every public await, cancelled at every step boundary

CALL = '<tool_call>\n{"name": "double", "arguments": {"n": 4}}\n</tool_call>'


@tool
def double(n: int) -> int:
    """Twice a number."""
    return 2 * n


async def run_generate(engine, session):
    await engine.generate("a prompt of its own", GenerateOptions(max_tokens=8, n=2))


async def run_stream(engine, session):
    async for _ in engine.stream("a prompt of its own", GenerateOptions(max_tokens=8)):
        pass


async def run_session(engine, session):
    await session.run("double four")


async def run_session_stream(engine, session):
    async with aclosing(session.stream("double four")) as events:
        async for _ in events:
            pass


async def run_fork(engine, session):
    (child,) = await session.fork(1)
    await child.run("go on")


async def run_erase(engine, session):
    await session.erase()


async def run_forget(engine, session):
    await engine.forget(session.token_ids)


async def run_check(engine, session):
    await engine.check()


AWAITS = [
    run_generate, run_stream, run_session, run_session_stream, run_fork, run_erase, run_forget,
    run_check,
]  # fmt: skip


@pytest.mark.parametrize("action", AWAITS, ids=lambda action: action.__name__)
async def test_cancelled_at_every_step_boundary(action, tokenizer, template):
    """One engine; each round lets the action go one step further, then cancels it there."""
    engine = FakeEngine(
        num_blocks=900, context=3000, step_tokens=300, tokenizer=tokenizer, template=template,
        checked=False,
    )  # fmt: skip
    async with engine:
        engine.runner.script = script = RepeatedScript(tokenizer)
        done = False
        for num_steps in range(400):
            done = await cancel_after(num_steps, action, engine, script)
            if done:
                break
        assert done, "the action never came to its end"
        assert num_steps > 0 or action in (run_erase, run_forget, run_check)


class RepeatedScript(Script):
    """A session's first answer is a call, the next a text; anything else is noise."""

    def __init__(self, tokenizer):
        self._tokenizer, self._in_session, self._ids = tokenizer, 0, {}

    def __call__(self, request, num_output_tokens):
        if request.options.max_tokens != 300:
            return None
        if request.id not in self._ids:
            text = CALL if self._in_session == 0 else "8"
            self._in_session += 1
            end = [*self._tokenizer.eos_token_ids]
            self._ids[request.id] = [*self._tokenizer.encode(text), *end]
        ids = self._ids[request.id]
        return ids[min(num_output_tokens, len(ids) - 1)]

    def begin(self):
        self._in_session = 0


async def cancel_after(num_steps, action, engine, script):
    """Whether the action came to its end within that many steps."""
    script.begin()
    session = engine.session(tools=[double], options=GenerateOptions(max_tokens=300))
    if action in (run_erase, run_forget):
        await session.run("double four")
    before = session.token_ids, list(session.messages)
    engine.gate.close()
    # another caller keeps the step thread busy, so that every command waits for a step
    other = asyncio.create_task(engine.generate([9, 9, 9], GenerateOptions(max_tokens=2)))
    await engine.until_held()
    task = asyncio.create_task(action(engine, session))
    await asyncio.sleep(0)
    engine.gate.allow(num_steps)
    await until(lambda: engine.gate.is_holding or task.done())
    done = task.done()
    task.cancel()
    await asyncio.wait([task])
    assert done or task.cancelled()
    if not done:
        assert (session.token_ids, session.messages) == before
    engine.gate.open()
    await asyncio.wait([other])
    assert await engine.leased_blocks() == 0
    assert engine.stats().running == engine.stats().waiting == 0
    if not done:
        await session.fork(1)  # it is not busy
    return done


@pytest.mark.parametrize("num_steps", range(6))
async def test_closing_cancelled_at_every_step_boundary(num_steps):
    engine = FakeEngine()
    await engine.__aenter__()
    engine.gate.close()
    task = asyncio.create_task(engine.generate([1, 2, 3], SIX))
    await engine.until_held()
    engine.gate.allow(num_steps)
    await until(lambda: engine.gate.is_holding or task.done())
    closing = asyncio.create_task(Engine.aclose(engine))
    await asyncio.sleep(0)
    closing.cancel()
    engine.gate.open()
    await asyncio.wait([closing, task])
    assert task.exception() is None or isinstance(task.exception(), EngineClosed)
    await until(lambda: engine.runner.closed)
    await engine.aclose()


# ---- real engines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


def tiny_config(kv_bytes=8 << 20):
    return EngineConfig(
        device="cpu", random_weights=True, device_kv_bytes=kv_bytes, block_tokens=16, max_batch=4
    )


def step_threads():
    return [thread for thread in threading.enumerate() if thread.name == "agentrt-step"]


@pytest.mark.asyncio(loop_factories=["default"])
async def test_fifty_open_and_close_cycles_leave_no_memory_behind(tiny):
    """The KV pool alone is 8 MiB: leaking one in four of them would show."""
    process, seen, outputs = psutil.Process(), [], set()
    for _ in range(50):
        async with Engine(tiny, tiny_config()) as engine:
            done = await engine.generate([1, 2, 3], SIX)
            outputs.add(done.token_ids)
        seen.append(process.memory_info().rss)
    assert len(outputs) == 1
    await until(lambda: not step_threads())
    warm = max(seen[5:15])
    assert max(seen[-10:]) - warm < 40 * (8 << 20) / 4, [size >> 20 for size in seen]


async def test_two_real_engines_side_by_side(tiny):
    async with Engine(tiny, tiny_config()) as one, Engine(tiny, tiny_config(1 << 20)) as two:
        calls = [engine.generate([i, 2, 3], SIX) for i in range(1, 5) for engine in (one, two)]
        done = await asyncio.gather(*calls)
        assert [d.token_ids for d in done[::2]] == [d.token_ids for d in done[1::2]]
        await asyncio.gather(one.check(), two.check())


def test_a_real_engine_in_a_second_loop_and_in_a_thread(tiny):
    outputs = []

    async def main():
        async with Engine(tiny, tiny_config(1 << 20)) as engine:
            outputs.append((await engine.generate([1, 2, 3], SIX)).token_ids)

    asyncio.run(main())
    asyncio.run(main())
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join()
    assert len(outputs) == 3
    assert len(set(outputs)) == 1
    asyncio.run(until(lambda: not step_threads()))


async def test_a_real_engine_refuses_bad_requests_and_lives(tiny):
    async with Engine(tiny, tiny_config(1 << 20)) as engine:
        expected = (await engine.generate([1, 2, 3], SIX)).token_ids
        for prompt, wrong in (
            ([1, 128], {}),
            ([], {}),
            ([1] * 256, {}),
            ([1], {"logit_bias": {128: 1.0}}),
            ([1], {"logit_bias": dict.fromkeys(range(128), float("-inf")), "temperature": 1.0}),
        ):
            with pytest.raises(RequestInvalid):
                await engine.generate(prompt, GenerateOptions(max_tokens=6, **wrong))
        extreme = GenerateOptions(max_tokens=6, temperature=1e-300, top_p=1e-300, min_p=1.0)
        await engine.generate([1, 2, 3], extreme)
        long = await engine.generate([1] * 250, GenerateOptions(max_tokens=256, ignore_eos=True))
        assert len(long.token_ids) == 6  # to the end of the context
        assert (await engine.generate([1, 2, 3], SIX)).token_ids == expected
