"""The engine over the fake device: results, sharing, cancelling, limits, closing, failing."""

import asyncio
import gc
import threading

import pytest
from fakes import EOS, FakeEngine, greedy_after, until
from scripted import Script

from agentrt import EngineConfig, Finished, GenerateOptions, TextDelta
from agentrt.config import default_cache_dir
from agentrt.engine import Engine
from agentrt.errors import (
    EngineClosed,
    EngineFailed,
    GrammarInvalid,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    RequestInvalid,
)
from agentrt.grammar import regex
from agentrt.registry import locate
from agentrt.tokenizer import load_tokenizer

SHORT = GenerateOptions(max_tokens=6, ignore_eos=True)


def options(**changes):
    return GenerateOptions(**{"max_tokens": 6, "ignore_eos": True, **changes})


async def serves(engine):
    """The engine is alive, and right."""
    done = await engine.generate([7, 8, 9], SHORT)
    assert list(done.token_ids) == greedy_after([7, 8, 9], 6)
    assert await engine.leased_blocks() == 0


# ---- results


async def test_generate_gives_tokens_usage_and_reason():
    async with FakeEngine() as engine:
        done = await engine.generate([1, 2, 3], SHORT)
        assert list(done.token_ids) == greedy_after([1, 2, 3], 6)
        assert (done.finish_reason, done.logprobs, done.others) == ("length", None, ())
        assert (done.usage.prompt_tokens, done.usage.output_tokens) == (3, 6)
        assert sum(done.usage.cached_tokens.values()) == 0
        assert 0 <= done.usage.ttft_s <= done.usage.total_s


async def test_a_second_turn_computes_only_what_is_new():
    async with FakeEngine() as engine:
        first = await engine.generate(list(range(1, 22)), SHORT)
        log = [*range(1, 22), *first.token_ids]
        second = await engine.generate([*log, 5, 6], SHORT)
        # the last generated token was never fed to the model
        assert second.usage.cached_tokens["device"] == len(log) - 1
        assert list(second.token_ids) == greedy_after([*log, 5, 6], 6)


async def test_stream_gives_every_token_and_then_finished():
    async with FakeEngine() as engine:
        events = [event async for event in engine.stream([1, 2, 3], SHORT)]
        *deltas, last = events
        assert isinstance(last, Finished)
        assert all(isinstance(delta, TextDelta) for delta in deltas)
        ids = [token for delta in deltas for token in delta.token_ids]
        assert ids == list(last.completion.token_ids) == greedy_after([1, 2, 3], 6)


async def test_an_end_token_stops_unless_ignored():
    prompt = next([i, i + 1] for i in range(60) if EOS in greedy_after([i, i + 1], 40))
    expected = greedy_after(prompt, 40, ignore_eos=False)
    async with FakeEngine() as engine:
        done = await engine.generate(prompt, options(max_tokens=40, ignore_eos=False))
        assert (list(done.token_ids), done.finish_reason) == (expected, "stop")
        done = await engine.generate(prompt, options(max_tokens=40))
        assert list(done.token_ids) == greedy_after(prompt, 40)


async def test_a_stop_token_ends_the_output():
    expected = greedy_after([4, 5], 20)
    async with FakeEngine() as engine:
        done = await engine.generate([4, 5], options(max_tokens=20, stop_token_ids=(expected[3],)))
        assert list(done.token_ids) == expected[: expected.index(expected[3]) + 1]
        assert done.finish_reason == "stop"


async def test_a_stop_string_over_tokens_ends_the_text(tokenizer):
    async with FakeEngine(tokenizer=tokenizer) as engine:
        engine.runner.script = Script(tokenizer, ["one STO STOP two"])
        events = [e async for e in engine.stream("x", options(max_tokens=99, stop="STOP"))]
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "one STO "
        completion = events[-1].completion
        assert (completion.text, completion.finish_reason) == ("one STO ", "stop")


async def test_text_is_whole_characters_without_the_end_token(tokenizer):
    async with FakeEngine(tokenizer=tokenizer) as engine:
        engine.runner.script = Script(tokenizer, ["né 🙂!"])
        events = [e async for e in engine.stream("x", GenerateOptions(max_tokens=99))]
        texts = [e.text for e in events if isinstance(e, TextDelta)]
        assert "".join(texts) == events[-1].completion.text == "né 🙂!"
        assert not any("\ufffd" in text for text in texts)
        assert events[-1].completion.finish_reason == "stop"


async def test_samples_share_the_prompt_and_follow_their_seeds():
    prompt = list(range(1, 40))
    async with FakeEngine() as engine:
        done = await engine.generate(prompt, options(n=3, temperature=1.0, seed=5))
        stats = engine.stats()
        # below 16 tokens a request does not wait for another to compute them
        assert stats.computed_tokens < 39 + 2 * 16
        for i, sample in enumerate([done, *done.others]):
            alone = await engine.generate(prompt, options(temperature=1.0, seed=5 + i))
            assert alone.token_ids == sample.token_ids
        assert len({sample.token_ids for sample in [done, *done.others]}) == 3


async def test_output_does_not_depend_on_concurrency():
    """Queueing, sharing, preemption and eviction, in a pool that is too small for all."""
    trunk = list(range(1, 30))
    prompts = [[*trunk[: 3 * i], 40 + i, 41 + i] for i in range(10)] * 3
    async with FakeEngine(num_blocks=30, max_batch=6, step_tokens=12) as engine:
        made = options(max_tokens=24)
        all_done = await asyncio.gather(*[engine.generate(p, made) for p in prompts])
        stats = engine.stats()
        assert stats.preempted > 0
        assert stats.evicted_tokens > 0
        assert stats.cached_tokens > 0
        assert engine.runner.num_copies > 0
        assert max(engine.runner.rows) <= 12
        for prompt, done in zip(prompts, all_done, strict=True):
            assert list(done.token_ids) == greedy_after(prompt, 24)
        assert await engine.leased_blocks() == 0


async def test_sampled_output_does_not_depend_on_concurrency():
    made = [options(max_tokens=12, temperature=1.0, seed=i) for i in range(8)]
    async with FakeEngine(num_blocks=20, max_batch=5) as engine:
        together = await asyncio.gather(*[engine.generate([1, 2, 3], one) for one in made])
        alone = [await engine.generate([1, 2, 3], one) for one in made]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]


async def test_stats_count_what_happened():
    async with FakeEngine() as engine:
        assert engine.stats().steps == 0
        await engine.generate(list(range(1, 11)), SHORT)
        await engine.generate(list(range(1, 11)), SHORT)
        stats = engine.stats()
        assert (stats.finished, stats.cancelled, stats.preempted) == (2, 0, 0)
        assert (stats.prompt_tokens, stats.cached_tokens, stats.computed_tokens) == (20, 9, 11)
        assert stats.output_tokens == stats.steps + stats.accepted_tokens == 12
        assert stats.running == stats.waiting == 0
        assert stats.kv_used_bytes == (stats.kv_blocks - stats.kv_free_blocks) * 64
        assert 0 <= stats.overhead <= 1
        assert "running=0" in repr(engine)


async def test_forget_drops_a_prefix_that_nobody_else_uses():
    async with FakeEngine() as engine:
        trunk = list(range(1, 17))
        one = await engine.generate([*trunk, 20, 21], SHORT)
        await engine.generate([*trunk, 30, 31], SHORT)
        dropped = await engine.forget([*trunk, 20, 21, *one.token_ids])
        assert dropped == 2 + 5  # the other request still uses the trunk
        again = await engine.generate([*trunk, 20, 21], SHORT)
        assert again.usage.cached_tokens["device"] == len(trunk)
        await engine.check()


# ---- limits


async def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers():
    async with FakeEngine(context=32) as engine:
        with pytest.raises(PromptTooLong, match=r"40 tokens.* 32 "):
            await engine.generate([1] * 40, SHORT)
        with pytest.raises(PromptTooLong):
            await engine.generate([1] * 32, SHORT)
        await serves(engine)


async def test_output_ends_where_the_context_does():
    async with FakeEngine(context=32) as engine:
        done = await engine.generate([1] * 30, options(max_tokens=256))
        assert (len(done.token_ids), done.finish_reason) == (2, "length")
        await serves(engine)


async def test_what_the_pool_can_never_hold_is_refused_with_the_numbers():
    async with FakeEngine(num_blocks=10) as engine:
        with pytest.raises(PromptTooLong, match=r"take 37 tokens.* serves 36.*device_kv_bytes"):
            await engine.generate([1] * 7, options(max_tokens=30))
        done = await engine.generate([1] * 6, options(max_tokens=30))
        assert list(done.token_ids) == greedy_after([1] * 6, 30)
        await serves(engine)


async def test_what_fits_later_waits():
    async with FakeEngine(num_blocks=10) as engine:
        made = options(max_tokens=20)
        prompts = [[i] * 16 for i in range(1, 6)]
        all_done = await asyncio.gather(*[engine.generate(p, made) for p in prompts])
        for prompt, done in zip(prompts, all_done, strict=True):
            assert list(done.token_ids) == greedy_after(prompt, 20)


async def test_a_full_queue_refuses_and_says_what_to_raise():
    async with FakeEngine(max_batch=2, max_waiting=3) as engine:
        engine.gate.close()
        tasks = [asyncio.create_task(engine.generate([i], SHORT)) for i in range(1, 6)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="max_waiting"):
            await engine.generate([9], SHORT)
        # the samples that found room must not run on unseen
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        with pytest.raises(Overloaded):
            await engine.generate([9], options(n=4, max_tokens=200))
        engine.gate.open()
        await asyncio.gather(*tasks[1:])
        await serves(engine)
        assert engine.stats().running == 0


# ---- bad input


BAD_PROMPTS = {
    "empty ids": ([], RequestInvalid, "empty"),
    "empty text": ("", RequestInvalid, "empty"),
    "id too large": ([1, 9_999], RequestInvalid, "9999 is outside"),
    "huge id": ([1, 1 << 80], RequestInvalid, "int"),
    "negative id": ([1, -2], RequestInvalid, "-2 is outside"),
    "floats": ([1.0, 2.0], RequestInvalid, "float"),
    "bools": ([True, False], RequestInvalid, "bool"),
    "strings": (["a", "b"], RequestInvalid, "int"),
    "nested": ([[1, 2], [3, 4]], RequestInvalid, "flat"),
    "ragged": ([[1, 2], [3]], RequestInvalid, "flat"),
    "none": (None, RequestInvalid, "flat"),
    "a number": (5, RequestInvalid, "flat"),
    "bytes": (b"hello", RequestInvalid, "bytes"),
    "no UTF-8": (b"\xff\xfe", RequestInvalid, "bytes"),
    "lone surrogate": ("a \ud800 b", RequestInvalid, "Unicode"),
    "too long": ([1] * 300, PromptTooLong, "300 tokens"),
    "10 M ids": ([1] * 10_000_000, PromptTooLong, "10000000 tokens"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
@pytest.mark.asyncio(loop_factories=["default"])
async def test_a_bad_prompt_is_a_clear_error_and_the_engine_lives(case, tokenizer):
    prompt, error, text = BAD_PROMPTS[case]
    async with FakeEngine(tokenizer=tokenizer) as engine:
        with pytest.raises(error, match=text):
            await engine.generate(prompt, SHORT)
        if prompt is None or isinstance(prompt, int) or len(prompt) < 1000:
            with pytest.raises(error, match=text):
                await anext(engine.stream(prompt, SHORT))
        done = await engine.generate("hello", SHORT)
        assert len(done.token_ids) == 6
        assert await engine.leased_blocks() == 0


@pytest.fixture(scope="module")
def smollm():
    return load_tokenizer(locate("smollm2-135m", default_cache_dir()))


@pytest.mark.asyncio(loop_factories=["default"])
async def test_ten_megabytes_of_text_are_refused_with_the_numbers(smollm):
    async with FakeEngine(tokenizer=smollm) as engine:
        with pytest.raises(PromptTooLong, match=r"has 2000001 tokens, the context holds 256"):
            await engine.generate("word " * 2_000_000, SHORT)
        assert len((await engine.generate("hello", SHORT)).token_ids) == 6


BAD_OPTIONS = {
    "temperature NaN": ({"temperature": float("nan")}, RequestInvalid),
    "temperature infinite": ({"temperature": float("inf")}, RequestInvalid),
    "temperature negative": ({"temperature": -1.0}, RequestInvalid),
    "max_tokens negative": ({"max_tokens": -1}, RequestInvalid),
    "n zero": ({"n": 0}, RequestInvalid),
    "top_p zero": ({"top_p": 0.0}, RequestInvalid),
    "unknown name": ({"tempratur": 1.0}, TypeError),
    "bias of an unknown token": ({"logit_bias": {9_999: 1.0}}, RequestInvalid),
    "infinite bias": ({"logit_bias": {1: float("inf")}, "temperature": 1.0}, RequestInvalid),
    "every token forbidden": (
        {"logit_bias": {i: float("-inf") for i in range(259)}, "temperature": 1.0},
        RequestInvalid,
    ),
    "grammar that is none": ({"grammar": "start: ((("}, GrammarInvalid),
    "grammar of another type": ({"grammar": 5}, RequestInvalid),
    "pattern that is none": ({"grammar": regex("(")}, GrammarInvalid),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
async def test_a_bad_option_is_a_clear_error_and_the_engine_lives(case, tokenizer):
    wrong, error = BAD_OPTIONS[case]
    async with FakeEngine(tokenizer=tokenizer) as engine:
        good = asyncio.create_task(engine.generate("meanwhile", options(max_tokens=30)))
        with pytest.raises(error):
            await engine.generate("hello", options(**wrong))
        assert len((await good).token_ids) == 30
        assert await engine.leased_blocks() == 0


async def test_more_log_probabilities_than_tokens_is_an_error():
    async with FakeEngine(vocab_size=32) as engine:
        with pytest.raises(RequestInvalid, match="top_logprobs"):
            await engine.generate([1], options(top_logprobs=64))
        assert len((await engine.generate([1], options(top_logprobs=32))).logprobs) == 6


async def test_a_model_without_text_says_so():
    async with FakeEngine() as engine:
        for wrong in (
            lambda: engine.tokenizer,
            lambda: engine.session(),
        ):
            with pytest.raises(RequestInvalid):
                wrong()
        with pytest.raises(RequestInvalid, match="token ids"):
            await engine.generate("text", SHORT)
        with pytest.raises(RequestInvalid, match="grammar"):
            await engine.generate([1], options(grammar=regex("a")))
        await serves(engine)


async def test_stream_of_several_samples_is_refused():
    async with FakeEngine() as engine:
        with pytest.raises(RequestInvalid, match="n must be 1"):
            await anext(engine.stream([1], options(n=2)))


async def test_a_grammar_shapes_the_output(tokenizer):
    async with FakeEngine(tokenizer=tokenizer) as engine:
        done = await engine.generate("x", options(grammar=regex("[ab]{4}"), ignore_eos=False))
        assert len(done.text) == 4
        assert set(done.text) <= {"a", "b"}
        assert done.finish_reason == "stop"


# ---- cancelling


async def test_leaving_a_stream_frees_its_blocks():
    async with FakeEngine() as engine:
        engine.gate.close()  # else a busy machine may end it before it is left
        engine.gate.allow(2)
        stream = engine.stream([1, 2, 3], options(max_tokens=200))
        assert isinstance(await anext(stream), TextDelta)
        await stream.aclose()
        engine.gate.open()
        assert await engine.leased_blocks() == 0
        assert engine.stats().cancelled == 1
        await serves(engine)


async def test_cancelling_frees_within_one_step():
    async with FakeEngine() as engine:
        engine.gate.close()
        task = asyncio.create_task(engine.generate([1, 2, 3], options(max_tokens=200)))
        await engine.until_held()
        engine.gate.allow(5)
        await engine.until_held()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.allow(1)  # the step that was on its way
        assert await engine.leased_blocks() == 0
        assert engine.runner.num_steps == 6


async def test_cancelling_one_does_not_disturb_the_others():
    async with FakeEngine(num_blocks=24) as engine:
        prompts = [[1, 2, 3, 4, 5, i] for i in range(6, 18)]
        made = options(max_tokens=20)
        tasks = [asyncio.create_task(engine.generate(p, made)) for p in prompts]
        await until(lambda: engine.stats().output_tokens or engine.runner.num_steps > 3)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks)
        for prompt, task in list(zip(prompts, tasks, strict=True))[1::2]:
            assert list(task.result().token_ids) == greedy_after(prompt, 20)
        await serves(engine)


async def test_a_timeout_around_generate_cancels_it():
    async with FakeEngine() as engine:
        engine.gate.close()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await engine.generate([1], options(max_tokens=200))
        engine.gate.open()
        assert await engine.leased_blocks() == 0


# ---- opening, closing, failing


async def test_closing_ends_all_waiters():
    engine = FakeEngine(max_batch=2)
    await engine.__aenter__()
    engine.gate.close()
    tasks = [asyncio.create_task(engine.generate([i], SHORT)) for i in range(1, 8)]
    stream = engine.stream([9], SHORT)
    tasks.append(asyncio.create_task(anext(stream)))
    await engine.until_held()
    await engine.aclose()
    await asyncio.wait(tasks)
    for task in tasks:
        assert isinstance(task.exception(), EngineClosed)
    assert engine.runner.closed
    assert "closed" in repr(engine)


async def test_a_closed_engine_refuses_everything():
    engine = FakeEngine()
    async with engine:
        pass
    await engine.aclose()  # again is fine
    with pytest.raises(EngineClosed, match="async with"):
        await engine.generate([1], SHORT)
    with pytest.raises(EngineClosed):
        await anext(engine.stream([1], SHORT))
    for call in (lambda: engine.stats(), lambda: engine.session(), lambda: engine.resolved):
        with pytest.raises(EngineClosed):
            call()
    for call in (engine.check(), engine.forget([1])):
        with pytest.raises(EngineClosed):
            await call


async def test_an_engine_can_be_opened_again():
    engine = FakeEngine()
    for _ in range(2):
        async with engine:
            await serves(engine)


async def test_opening_twice_is_an_error():
    async with FakeEngine() as engine:
        with pytest.raises(RequestInvalid, match="open already"):
            await engine.__aenter__()
        await serves(engine)


async def test_closing_while_a_grammar_compiles(tokenizer):
    engine = FakeEngine(tokenizer=tokenizer)
    async with engine:
        task = asyncio.create_task(engine.generate("x", options(grammar=regex("a+"))))
        await asyncio.sleep(0)
    with pytest.raises(EngineClosed):
        await task


async def test_a_failing_step_fails_every_waiter_with_the_cause():
    async with FakeEngine(max_batch=2) as engine:
        engine.runner.fail_at_step = 3
        calls = [engine.generate([i], options(max_tokens=9)) for i in range(1, 6)]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, EngineFailed)
            assert isinstance(error.__cause__, OSError)
        for call in (engine.generate([1], SHORT), engine.check(), engine.forget([1])):
            with pytest.raises(EngineFailed) as caught:
                await call
            assert isinstance(caught.value.__cause__, OSError)
        assert engine.stats().finished == 0


async def test_failing_ends_a_stream_after_its_text():
    async with FakeEngine() as engine:
        engine.runner.fail_at_step = 3
        seen = []

        async def read():
            async for event in engine.stream([1, 2], SHORT):
                seen.extend(event.token_ids)

        with pytest.raises(EngineFailed):
            await read()
        assert seen == greedy_after([1, 2], 3)


async def test_a_model_that_is_not_there_leaves_nothing_open(tmp_path):
    engine = Engine(str(tmp_path / "nothing"), EngineConfig(cache_dir=tmp_path))
    with pytest.raises(ModelNotFound):
        await engine.__aenter__()
    with pytest.raises(EngineClosed):
        await engine.generate([1])
    await until(lambda: "agentrt-step" not in [t.name for t in threading.enumerate()])


class SlowToOpen(FakeEngine):
    """Stands still while it opens, and remembers what it made."""

    def __init__(self):
        super().__init__()
        self.entered, self.go_on, self.made = threading.Event(), threading.Event(), []

    def _open_parts(self, event_loop, abandoned):
        self.entered.set()
        self.go_on.wait()
        self.made.append(super()._open_parts(event_loop, abandoned))
        return self.made[0]


async def test_cancelling_the_opening_closes_what_it_goes_on_to_make():
    engine = SlowToOpen()
    opening = asyncio.create_task(engine.__aenter__())
    await until(engine.entered.is_set)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    engine.go_on.set()
    await until(lambda: engine.runner.closed)
    with pytest.raises(EngineClosed):
        await engine.generate([1], SHORT)


async def test_cancelling_the_closing_still_closes():
    engine = FakeEngine()
    await engine.__aenter__()
    hold = threading.Event()
    engine.runner.before_step = hold.wait
    task = asyncio.create_task(engine.generate([1], SHORT))
    await until(lambda: engine.stats().running or engine.stats().waiting)
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0.01)
    closing.cancel()
    hold.set()
    await asyncio.wait([closing])
    with pytest.raises(EngineClosed):
        await task
    await until(lambda: engine.runner.closed)


async def test_two_engines_in_one_process():
    async with FakeEngine() as one, FakeEngine(num_blocks=20) as two:
        calls = [engine.generate([i], SHORT) for i in range(1, 6) for engine in (one, two)]
        all_done = await asyncio.gather(*calls)
        assert all_done[0].token_ids == all_done[1].token_ids
        await serves(one)
        await one.aclose()
        await serves(two)


def test_one_engine_after_another_loop_and_in_any_thread():
    async def main():
        async with FakeEngine() as engine:
            await serves(engine)

    asyncio.run(main())
    asyncio.run(main())
    failures = []

    def in_thread():
        try:
            asyncio.run(main())
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=in_thread) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_loop_that_ends_without_closing_hangs_nobody():
    """asyncio.run cancels the tasks; the step thread finds the loop closed and goes on alone."""
    engines = []

    async def main():
        engine = FakeEngine()
        engines.append(engine)
        await engine.__aenter__()
        engine.gate.close()
        task = asyncio.create_task(engine.generate([1], SHORT))
        await engine.until_held()
        assert not task.done()

    asyncio.run(main())
    engines[0].gate.open()
    asyncio.run(engines[0].aclose())
    assert engines[0].runner.closed
    gc.collect()
