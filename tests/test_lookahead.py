"""Steps that are launched before the tokens of the last one are known give the same results."""

import asyncio
import random

import pytest
from fakes import FakeEngine, greedy_after

from agentrt import GenerateOptions


def options(num_tokens: int, **changes: object) -> GenerateOptions:
    return GenerateOptions(max_tokens=num_tokens, **{"ignore_eos": True, **changes})


async def test_tokens_are_those_of_a_device_that_waits() -> None:
    prompts = [[i + 1] * (1 + 3 * i) for i in range(12)]
    async with FakeEngine(ahead=True, num_blocks=80) as engine:
        runs = [engine.generate(prompt, options(3 + i)) for i, prompt in enumerate(prompts)]
        done = await asyncio.gather(*runs)
        assert await engine.leased_blocks() == 0
    for i, (prompt, one) in enumerate(zip(prompts, done, strict=True)):
        assert list(one.token_ids) == greedy_after(prompt, 3 + i)
        assert one.finish_reason == "length"


async def test_preempted_requests_continue_where_they_were() -> None:
    async with FakeEngine(ahead=True, num_blocks=14, max_batch=6) as engine:
        runs = [engine.generate([i + 1] * 5, options(20)) for i in range(6)]
        done = await asyncio.gather(*runs)
        assert engine.stats().preempted > 0
        assert await engine.leased_blocks() == 0
    for i, one in enumerate(done):
        assert list(one.token_ids) == greedy_after([i + 1] * 5, 20)


async def test_a_request_that_ends_early_takes_nothing_from_the_step_behind() -> None:
    """An end-of-text token is known only when the next step runs already."""
    pairs = [[i, j] for i in range(1, 60) for j in range(1, 60)]
    ending = next(pair for pair in pairs if 3 <= len(greedy_after(pair, 9, ignore_eos=False)) < 9)
    expected = greedy_after(ending, 9, ignore_eos=False)
    async with FakeEngine(ahead=True) as engine:
        one, other = await asyncio.gather(
            engine.generate(ending, options(9, ignore_eos=False)),
            engine.generate([7, 8], options(30)),
        )
        again = await engine.generate([*ending, *expected, 9], options(4))
        assert await engine.leased_blocks() == 0
    assert list(one.token_ids) == expected
    assert one.finish_reason == "stop"
    assert list(other.token_ids) == greedy_after([7, 8], 30)
    assert list(again.token_ids) == greedy_after([*ending, *expected, 9], 4)


async def test_a_request_that_the_host_samples_is_never_ahead() -> None:
    """Its tokens are needed for the next step; others beside it may be drawn by the device."""
    async with FakeEngine(ahead=True) as engine:
        plain, hosted = await asyncio.gather(
            engine.generate([1, 2], options(12)),
            engine.generate([3, 4], options(12, top_logprobs=1)),
        )
    assert list(plain.token_ids) == greedy_after([1, 2], 12)
    assert list(hosted.token_ids) == greedy_after([3, 4], 12)
    assert hosted.logprobs is not None
    assert len(hosted.logprobs) == 12


@pytest.mark.parametrize("seed", range(4))
async def test_cancelling_at_any_step_frees_everything(seed: int) -> None:
    chance = random.Random(seed)
    async with FakeEngine(ahead=True, num_blocks=30) as engine:
        tasks = [
            asyncio.create_task(engine.generate([i + 1] * chance.randrange(1, 20), options(25)))
            for i in range(10)
        ]
        for task in chance.sample(tasks, 6):
            await asyncio.sleep(chance.random() * 0.01)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await engine.leased_blocks() == 0
        assert engine.stats().running == 0
