"""The step thread: events, cancelling, failing and closing, without an event loop."""

import threading

import pytest
from fakes import FakeClock, FakeRunner, greedy_after, make_request, resolved

from agentrt.cache import PrefixCache
from agentrt.errors import AgentrtError, EngineClosed, EngineFailed, GrammarInvalid
from agentrt.loop import Loop
from agentrt.scheduler import Scheduler
from agentrt.speculate import Drafter
from agentrt.types import Finished, GenerateOptions, TextDelta


class Inbox:
    """What one request's caller got, and a wait for its end."""

    def __init__(self):
        self.events = []
        self.ended = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if not isinstance(event, TextDelta):
            self.ended.set()

    @property
    def end(self):
        assert self.ended.wait(20), "nobody told the caller how it ended"
        return self.events[-1]


@pytest.fixture
def loop():
    config = resolved(num_blocks=40)
    cache = PrefixCache(config.num_blocks, config.block_tokens)

    def post(events):
        for sink, event in events:
            sink(event)

    made = Loop(Scheduler(config, cache), FakeRunner(config.num_blocks), post, FakeClock())
    yield made
    made.runner.gate.open()
    made.close()
    made.join()


def submit(loop, prompt=(1, 2, 3), max_tokens=5, constraint=None):
    inbox = Inbox()
    request = make_request(prompt, max_tokens, sink=inbox)
    request.constraint = constraint
    loop.submit(request)
    return request, inbox


def test_events_are_the_tokens_in_order_and_then_the_end(loop):
    loop.start()
    _, inbox = submit(loop)
    completion = inbox.end.completion
    tokens = greedy_after((1, 2, 3), 5)
    assert [event.token_ids for event in inbox.events[:-1]] == [(token,) for token in tokens]
    assert completion.token_ids == tuple(tokens)
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens == 3
    assert completion.usage.output_tokens == 5


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_for_no_token_ends_when_its_prompt_is_computed(loop, ahead):
    loop.runner.ahead = ahead
    loop.scheduler.drafter = drafter = Drafter()
    loop.start()
    prompt = list(range(1, 22))
    for num_computed in (len(prompt), len(prompt)):
        _, inbox = submit(loop, prompt, max_tokens=0)
        completion = inbox.end.completion
        assert inbox.events == [inbox.end]
        assert (completion.token_ids, completion.finish_reason) == ((), "length")
        assert completion.usage.prompt_tokens == num_computed
    assert completion.usage.cached_tokens["device"] == len(prompt) - 1
    loop.call(loop.scheduler.check).result()
    assert loop.scheduler.cache.stats().leased_blocks == 0
    assert (loop.counters.finished, loop.counters.output_tokens) == (0, 0)
    assert not any(len(recent.tokens) for recent in drafter._recent.values())
    _, inbox = submit(loop, prompt, max_tokens=5)
    assert list(inbox.end.completion.token_ids) == greedy_after(prompt, 5)
    assert loop.counters.finished == 1


def test_requests_for_no_token_beside_others_in_a_small_pool(loop):
    loop.runner.gate.close()
    loop.start()
    asked = [submit(loop, [n, *range(1, 50 + n)], max_tokens=n % 3 * 6) for n in range(12)]
    loop.runner.gate.open()
    for request, inbox in asked:
        wanted = request.max_total_tokens - request.num_prompt_tokens
        prompt = request.tokens[: request.num_prompt_tokens].tolist()
        assert list(inbox.end.completion.token_ids) == greedy_after(prompt, wanted)
    loop.call(loop.scheduler.check).result()
    assert loop.scheduler.cache.stats().leased_blocks == 0


def test_times_come_from_the_clock(loop):
    loop.runner.before_step = lambda: setattr(loop.clock, "now", loop.clock.now + 2.0)
    loop.start()
    _, inbox = submit(loop, max_tokens=3)
    usage = inbox.end.completion.usage
    assert (usage.ttft_s, usage.total_s) == (2.0, 6.0)
    loop.call(lambda: None).result(20)
    assert (loop.counters.steps, loop.counters.step_s, loop.counters.forward_s) == (3, 6.0, 6.0)


def test_one_post_a_step():
    posts = []
    config = resolved(num_blocks=40)
    scheduler = Scheduler(config, PrefixCache(config.num_blocks, config.block_tokens))
    made = Loop(scheduler, FakeRunner(40), posts.append)
    made.runner.gate.close()
    made.start()
    requests = [make_request((i,), 4) for i in range(1, 4)]
    for request in requests:
        made.submit(request)
    made.call(lambda: None).cancel()
    made.runner.gate.open()
    made.close()
    made.join()
    assert len(posts) <= made.runner.num_steps + 1


def test_cancelling_frees_before_the_next_step_and_says_so(loop):
    loop.runner.gate.close()
    loop.start()
    request, inbox = submit(loop, max_tokens=50)
    loop.runner.gate.allow(3)
    loop.cancel(request.id)
    loop.runner.gate.allow(1)
    assert inbox.end.completion.finish_reason == "cancelled"
    assert loop.call(loop.scheduler.cache.stats).result(20).leased_blocks == 0
    assert loop.counters.cancelled == 1


def test_cancelling_what_has_ended_or_never_was_is_fine(loop):
    loop.start()
    request, inbox = submit(loop)
    assert isinstance(inbox.end, Finished)
    loop.cancel(request.id)
    loop.cancel("nobody")
    loop.call(loop.scheduler.check).result(20)
    assert loop.counters.cancelled == 0


def test_a_failing_step_tells_everybody_why(loop):
    loop.runner.gate.close()
    loop.runner.fail_at_step = 2
    loop.start()
    inboxes = [submit(loop, (i,), 9)[1] for i in range(1, 8)]  # some run, some wait
    loop.runner.gate.open()
    for inbox in inboxes:
        assert isinstance(inbox.end, EngineFailed)
        assert isinstance(inbox.end.__cause__, OSError)
        assert "the fake device broke" in str(inbox.end)
    loop.join()
    assert loop.runner.closed
    with pytest.raises(EngineFailed) as caught:
        submit(loop)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(EngineFailed):
        loop.call(lambda: None)
    loop.cancel("r0")  # nothing to do, and no error


def test_a_failure_reaches_what_came_during_the_failing_step(loop):
    """Calls and cancels queued behind the failing step are not lost, whatever state it left."""
    loop.runner.gate.close()
    loop.runner.fail_at_step = 0
    loop.start()
    first, inbox = submit(loop)
    while not loop.runner.gate.is_holding:
        pass
    first.lease = None  # as if the step had broken it: the cancel will trip over this
    loop.cancel(first.id)
    answer = loop.call(lambda: "called")
    _, late = submit(loop)
    loop.runner.gate.open()
    for waiting in (inbox, late):
        assert isinstance(waiting.end, EngineFailed)
    assert answer.result(20) == "called"


def test_a_command_that_fails_loses_no_other_command(loop):
    loop.runner.gate.close()
    loop.start()
    first, inbox = submit(loop, max_tokens=50)
    while not loop.runner.gate.is_holding:
        pass
    loop.runner.before_step = loop.scheduler.running.clear  # a bug: the cancel will trip over it
    loop.cancel(first.id)
    answer = loop.call(lambda: "called")
    _, late = submit(loop)
    loop.runner.gate.open()
    assert isinstance(inbox.end, EngineFailed)
    assert isinstance(late.end, EngineFailed)
    assert answer.result(20) == "called"


def test_closing_ends_every_waiter(loop):
    loop.runner.gate.close()
    loop.start()
    inboxes = [submit(loop, (i,), 9)[1] for i in range(1, 8)]
    loop.close()
    loop.runner.gate.open()
    for inbox in inboxes:
        assert isinstance(inbox.end, EngineClosed)
    loop.join()
    assert loop.runner.closed
    with pytest.raises(EngineClosed, match="closed"):
        submit(loop)


def test_a_call_returns_or_raises_what_its_function_does(loop):
    loop.start()
    assert loop.call(lambda: threading.current_thread().name).result(20) == "agentrt-step"

    def wrong():
        raise KeyError("x")

    with pytest.raises(KeyError):
        loop.call(wrong).result(20)
    assert loop.call(lambda: 3).result(20) == 3


class FailsAt:
    """A grammar that allows everything, until it turns out too complex."""

    is_finished = False
    is_cut_short = False

    def __init__(self, method, num):
        self._method, self._left = method, num

    def _count(self, method):
        if method == self._method:
            self._left -= 1
            if self._left < 0:
                raise GrammarInvalid("the grammar cannot be followed: too complex")

    def mask(self):
        import numpy as np

        self._count("mask")
        return np.full(2, -1, dtype=np.int32)

    def accept(self, token_id):
        self._count("accept")
        return True

    def take(self, token_id):
        self.accept(token_id)
        return token_id


@pytest.mark.parametrize("method", ["mask", "accept"])
def test_a_grammar_that_fails_on_the_way_fails_its_request_alone(loop, method):
    loop.runner.fills_masks = False
    loop.runner.gate.close()
    loop.start()
    _, bad = submit(loop, (1, 2), 9, FailsAt(method, 3))
    _, good = submit(loop, (3, 4), 9)
    loop.runner.gate.open()
    assert isinstance(bad.end, GrammarInvalid)
    assert isinstance(bad.end, AgentrtError)
    assert len(bad.events) == 4  # three tokens came before
    assert good.end.completion.token_ids == tuple(greedy_after((3, 4), 9))
    assert loop.call(loop.scheduler.cache.stats).result(20).leased_blocks == 0


def test_the_log_probabilities_are_in_the_completion(loop):
    loop.start()
    inbox = Inbox()
    options = GenerateOptions(max_tokens=4, top_logprobs=2, ignore_eos=True)
    loop.submit(make_request((5, 6), 4, options=options, sink=inbox))
    completion = inbox.end.completion
    assert [one.token_id for one in completion.logprobs] == list(completion.token_ids)
    assert all(len(one.top) == 2 for one in completion.logprobs)
