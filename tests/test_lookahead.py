"""Steps that are launched before the tokens of the last one are known give the same results."""

import asyncio
import random

import pytest
from fakes import FakeEngine, FakeRunner, greedy_after, until

from agentrt import GenerateOptions
from agentrt.runner import Computed
from agentrt.scheduler import Plan
from agentrt.speculate import DraftLimits


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


def beats(*, period: int, wrong_every: int = 0):
    """A script: the output counts round in a period, and now and then says something else."""

    def script(request, num_output: int) -> int:
        if wrong_every and num_output % wrong_every == wrong_every - 1:
            return 40 + num_output % 7
        return 1 + num_output % period

    return script


async def run(engine: FakeEngine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Outputs of requests that all begin in the same step."""
    engine.gate.close()
    asked = asyncio.gather(*(engine.generate(prompt, options(num_tokens)) for prompt in prompts))
    await until(lambda: engine._open.loop.num_queued == len(prompts))
    engine.gate.open()
    done = await asked
    assert await engine.leased_blocks() == 0
    return [list(one.token_ids) for one in done]


@pytest.mark.parametrize("period", [1, 2, 5, 9])
@pytest.mark.parametrize("wrong_every", [0, 11])
async def test_drafts_begin_behind_a_token_that_only_the_device_knows(
    period: int, wrong_every: int
) -> None:
    """The same tokens in fewer steps, though the first draft of a run is planned before the token
    in front of it came."""
    script = beats(period=period, wrong_every=wrong_every)
    expected = [script(None, n) for n in range(90)]
    steps = {}
    for speculation in (False, True):
        async with FakeEngine(ahead=True, num_blocks=128, speculation=speculation) as engine:
            engine.runner.script = script
            assert await run(engine, [[50, 51], [52, 53, 54]], 90) == [expected] * 2
            steps[speculation], stats = engine.runner.num_steps, engine.stats()
    assert stats.accepted_tokens > (30 if wrong_every else 60)
    assert steps[True] < steps[False] * (0.9 if wrong_every else 0.7)


async def test_text_without_matches_runs_ahead_in_every_step() -> None:
    """No word comes twice: nothing is drafted, and as many steps run ahead as without drafts."""
    async with FakeEngine(ahead=True, num_blocks=64) as engine:
        engine.runner.script = lambda request, n: 1 + n
        engine._open.loop.runner = spy = Spy(engine.runner)
        await run(engine, [[60, 61]], 50)
        assert engine.stats().drafted_tokens == 0
    assert len(spy.tickets) >= 50
    assert all(ticket.runs_ahead for ticket in spy.tickets)


class Spy:
    """A runner whose tickets are kept."""

    def __init__(self, runner: FakeRunner) -> None:
        self.tickets: list[Computed] = []
        self._runner = runner

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def launch(self, plan: Plan) -> Computed:
        self.tickets.append(self._runner.launch(plan))
        return self.tickets[-1]


async def test_nobody_waits_for_the_drafts_of_a_few() -> None:
    """Of six requests one repeats itself: alone it drafts, beside the others it does not."""
    limits = DraftLimits(guess_rows=64, guesses_a_request=4.0)

    def script(request, num_output: int) -> int | None:
        return 1 + num_output % 3 if int(request.tokens[0]) == 50 else None

    prompts = [[50, 51], *([i, i + 1, i + 2] for i in (10, 20, 30, 40, 55))]
    drafted = []
    for count in (1, 6):
        async with FakeEngine(ahead=True, num_blocks=128, step_tokens=64) as engine:
            engine.runner.script = script
            engine._open.loop.scheduler.drafter.limits = limits
            outputs = await run(engine, prompts[:count], 30)
            drafted.append(engine.stats().drafted_tokens)
        assert outputs[0] == [1 + n % 3 for n in range(30)]
        for prompt, output in zip(prompts[1:count], outputs[1:], strict=True):
            assert output == greedy_after(prompt, 30)
    assert drafted[0] > 15
    assert drafted[1] == 0
