"""The scheduler, stepped by hand over the fake device: limits, order, sharing, preemption."""

import numpy as np
import pytest
from attrs import define, field
from fakes import FakeRunner, greedy_after, make_request, resolved
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.cache import PrefixCache
from agentrt.cache.node import num_common
from agentrt.errors import CacheCorrupt
from agentrt.request import State
from agentrt.scheduler import Scheduler

RELAXED = settings(deadline=None, max_examples=60)


@define
class Steps:
    """Runs plans one by one, as the loop does, and keeps them."""

    scheduler: Scheduler
    runner: FakeRunner
    now: float = 0.0
    plans: list = field(factory=list)

    @classmethod
    def over(cls, num_blocks, **limits):
        config = resolved(num_blocks=num_blocks, **limits)
        cache = PrefixCache(config.num_blocks, config.block_tokens)
        return cls(Scheduler(config, cache), FakeRunner(num_blocks))

    def submit(self, *requests):
        for request in requests:
            self.scheduler.submit(request)

    def step(self):
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        self.plans.append(plan)
        states = [work.request.state for work in plan.work]
        assert states == sorted(states, key=lambda state: state is not State.DECODE)
        if not plan.work:
            return plan
        self.runner.copy(plan.copies)
        ticket = self.runner.launch(plan)
        for work in plan.work:
            self.scheduler.computed(work, self.now)
        for work, token in zip(ticket.sampling, ticket.logits.argmax(-1).tolist(), strict=True):
            work.request.append(token)
            if work.request.limit_reached(token):
                self.scheduler.finish(work.request, self.now)
        self.scheduler.check()
        return plan

    def run(self, most=2000):
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            assert self.step().work, "requests are alive, and nothing runs"
        raise AssertionError(f"not done after {most} steps: {self.scheduler}")

    @property
    def leased_blocks(self):
        return self.scheduler.cache.stats().leased_blocks

    @property
    def computed_tokens(self):
        return sum(plan.num_rows for plan in self.plans)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(1, 64, length).tolist()


# Prompts that share beginnings: a trunk's first tokens, then tokens of their own.
TRUNK = prompt(0, 40)
prompts = st.tuples(st.integers(0, 40), st.lists(st.integers(1, 5), max_size=12)).map(
    lambda parts: TRUNK[: parts[0]] + parts[1] or [1]
)
arrivals = st.lists(
    st.tuples(prompts, st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=12
)


@RELAXED
@given(arrivals, st.integers(1, 5), st.integers(1, 24), st.integers(17, 60))
def test_every_request_finishes_within_the_limits(arriving, max_batch, step_tokens, num_blocks):
    step_tokens = max(step_tokens, max_batch)  # as EngineConfig.resolve sees to
    steps = Steps.over(num_blocks, max_batch=max_batch, step_tokens=step_tokens)
    requests = []
    for tokens, max_tokens, pause in arriving:
        request = make_request(tokens, max_tokens, submitted_s=steps.now)
        requests.append((request, tokens, max_tokens))
        steps.submit(request)
        for _ in range(pause):
            steps.step()
    steps.run()
    for plan in steps.plans:
        assert plan.num_rows <= step_tokens
        assert len(plan.work) <= max_batch
        assert len({work.request.id for work in plan.work}) == len(plan.work)
    for request, tokens, max_tokens in requests:
        assert request.state is State.FINISHED
        assert request.output.tolist() == greedy_after(tokens, max_tokens)
    assert steps.leased_blocks == 0


@RELAXED
@given(st.lists(st.tuples(prompts, st.integers(1, 24)), min_size=2, max_size=6))
def test_preemption_does_not_change_the_output(parts):
    outputs = []
    for num_blocks in (20, 200):  # the first just holds the largest request, and a copy
        steps = Steps.over(num_blocks, max_batch=6, step_tokens=32)
        requests = [make_request(tokens, max_tokens) for tokens, max_tokens in parts]
        steps.submit(*requests)
        steps.run()
        outputs.append([request.output.tolist() for request in requests])
    assert outputs[0] == outputs[1]


def test_a_tiny_pool_preempts_the_youngest_and_serves_all():
    steps = Steps.over(8, max_batch=3, step_tokens=32)
    requests = [make_request(prompt(i, 6), 20) for i in range(3)]
    steps.submit(*requests)
    finished = []
    while steps.scheduler.waiting or steps.scheduler.running:
        steps.step()
        finished += [r for r in requests if r.state is State.FINISHED and r not in finished]
    assert steps.scheduler.num_preempted > 0
    assert finished == requests  # the oldest is never the one that waits
    for i, request in enumerate(requests):
        assert request.output.tolist() == greedy_after(prompt(i, 6), 20)
    assert steps.leased_blocks == 0


def test_decode_rows_come_first_and_prefill_fills_up():
    steps = Steps.over(60, max_batch=4, step_tokens=8)
    early = [make_request(prompt(i, 3), 20) for i in range(2)]
    steps.submit(*early)
    steps.step()
    long = make_request(prompt(9, 30), 4)
    steps.submit(long)
    plan = steps.step()
    assert [(work.request, work.num_tokens) for work in plan.work] == [
        (early[0], 1),
        (early[1], 1),
        (long, 6),
    ]
    assert plan.num_rows == 8


def test_a_long_prompt_goes_in_chunks_and_samples_once():
    steps = Steps.over(60, step_tokens=8)
    request = make_request(prompt(1, 21), 1)
    steps.submit(request)
    steps.run()
    chunks = [(work.start, work.num_tokens) for plan in steps.plans for work in plan.work]
    assert chunks == [(0, 8), (8, 8), (16, 5)]
    assert request.num_output_tokens == 1


def test_a_prefix_that_another_request_computes_is_computed_once():
    steps = Steps.over(100, max_batch=8, step_tokens=64)
    tokens = prompt(2, 48)
    requests = [make_request(tokens, 1) for _ in range(5)]
    steps.submit(*requests)
    steps.run()
    assert steps.computed_tokens == 48 + 4  # the others compute their last token only
    found = sorted(request.origins.own.tiers["device"] for request in requests)
    assert found == [0, 47, 47, 47, 47]
    assert len({tuple(request.output.tolist()) for request in requests}) == 1


def test_who_shares_no_prefix_does_not_wait_for_it():
    steps = Steps.over(100, max_batch=8, step_tokens=16)
    tokens = prompt(3, 48)
    twins, other = [make_request(tokens, 1) for _ in range(2)], make_request(prompt(4, 8), 1)
    steps.submit(*twins, other)
    for _ in range(4):
        steps.step()
    assert other.state is State.FINISHED


def test_the_longest_resident_prefix_goes_first_until_age_outweighs_it():
    def order_after(waited_s):
        steps = Steps.over(100, max_batch=1, step_tokens=64)
        steps.submit(make_request(TRUNK, 1))
        steps.run()
        old = make_request(prompt(5, 8), 1, submitted_s=steps.now)
        warm = make_request([*TRUNK, 1], 1, submitted_s=steps.now + waited_s)
        steps.now += waited_s
        steps.submit(old, warm)
        return steps.step().work[0].request is warm

    assert order_after(0.0)
    assert not order_after(1.0)


def test_who_comes_back_from_a_slow_tool_has_waited_for_it():
    steps = Steps.over(100, max_batch=1, step_tokens=64)
    log = np.array(prompt(1, 30), np.int32)
    pauses = steps.scheduler.pauses
    pauses.begin(1, log, "slow", 0.0)
    pauses.begin(2, log, "quick", 1.0)
    pauses.end(2, 2.0)
    assert pauses.waiting_since(np.append(log, 5)) is None  # another tool still runs
    pauses.end(1, 9.0)
    first = make_request(prompt(2, 31), 1, submitted_s=8.0)
    back = make_request([*log, 5], 1, submitted_s=9.0)
    steps.submit(first, back)
    assert back.waiting_since_s == 0.0
    assert steps.scheduler.order.of(steps.scheduler.waiting, 10.0) == [back, first]
    assert pauses.waiting_since(np.append(log, 5)) is None  # its next turn waits for itself


def test_of_sessions_that_come_back_the_longest_log_is_the_prompts():
    steps = Steps.over(100)
    log = np.array(prompt(3, 30), np.int32)
    pauses = steps.scheduler.pauses
    for number, length in enumerate((10, 20, 25)):
        pauses.begin(number, log[:length], "tool", float(number))
        pauses.end(number, 5.0)
    assert pauses.waiting_since(log[:22]) == 1.0
    assert pauses.waiting_since(log[:22]) == 0.0
    assert pauses.waiting_since(log[:22]) is None
    assert pauses.waiting_since(np.append(log[:24], 99)) is None
    assert pauses.waiting_since(log) == 2.0


def test_a_first_token_is_awaited_unless_others_wait_for_blocks():
    steps = Steps.over(8, step_tokens=8)
    assert not steps.scheduler.is_awaited
    first = make_request(prompt(1, 16), 4)
    steps.submit(first)
    steps.step()
    assert steps.scheduler.is_awaited
    second = make_request(prompt(2, 16), 4)
    steps.submit(second)
    steps.step()
    steps.step()
    assert second.state is State.WAITING
    assert steps.scheduler.is_short
    assert not steps.scheduler.is_awaited
    steps.run()
    assert not steps.scheduler.is_short


def test_a_large_request_at_the_head_is_not_overtaken_for_ever():
    """Small ones keep coming; the one that needs most of the pool still gets it."""
    steps = Steps.over(20, max_batch=4, step_tokens=16)
    steps.submit(*[make_request(prompt(i, 8), 12) for i in range(3)])
    large = make_request(prompt(50, 60), 8, submitted_s=steps.now)
    steps.submit(large)
    for i in range(300):
        steps.submit(make_request(prompt(100 + i, 8), 12, submitted_s=steps.now))
        steps.step()
        if large.state is State.FINISHED:
            return
    raise AssertionError("the large request starved")


@pytest.mark.parametrize("num_steps", range(6))
def test_finishing_early_frees_the_blocks_in_every_state(num_steps):
    steps = Steps.over(30, max_batch=1, step_tokens=4)
    first, second = make_request(prompt(1, 10), 5), make_request(prompt(2, 10), 5)
    steps.submit(first, second)
    for _ in range(num_steps):
        steps.step()
    for request in (first, second):
        steps.scheduler.finish(request, steps.now)
        assert request.state is State.FINISHED
        steps.scheduler.check()
    assert steps.leased_blocks == 0
    assert not steps.scheduler.plan(steps.now).work


def test_namespaces_do_not_share():
    steps = Steps.over(60, step_tokens=64)
    tokens = prompt(7, 20)
    for namespace in ("a", "b", "a"):
        request = make_request(tokens, 1)
        request.namespace = namespace
        steps.submit(request)
        steps.run()
    assert [plan.num_rows for plan in steps.plans] == [20, 20, 1]


def test_check_finds_a_broken_queue():
    steps = Steps.over(60)
    request = make_request([1, 2, 3], 5)
    steps.submit(request)
    steps.step()
    request.state = State.WAITING
    with pytest.raises(CacheCorrupt, match=request.id):
        steps.scheduler.check()


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_num_common(left, right):
    length = num_common(np.array(left, dtype=np.int32), np.array(right, dtype=np.int32))
    assert left[:length] == right[:length]
    assert length == min(len(left), len(right)) or left[length] != right[length]
