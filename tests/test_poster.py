"""Poster: first events go first, and the step thread gives way to them, but never for long."""

import asyncio
import time

import pytest

from agentrt import TextDelta, poster
from agentrt.errors import EngineFailed
from agentrt.poster import Poster

LONG_S = 10.0  # far above what a busy machine takes


def delta(text):
    return TextDelta(text, (1,))


class Stream:
    """A request's sink, which notes what came in a list that it shares with others."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def deliver(self, event):
        self.log.append((self.name, event.text if isinstance(event, TextDelta) else "end"))


async def posted(post, events):
    """As on the step thread. The events are out when this returns."""
    await asyncio.to_thread(post, events)
    await asyncio.sleep(0)


@pytest.fixture
def log():
    return []


@pytest.fixture
def no_limit(monkeypatch):
    monkeypatch.setattr(poster, "MOST_WAIT_S", LONG_S)


async def test_events_of_requests_that_begin_go_first_and_each_request_keeps_its_order(log):
    made = Poster(asyncio.get_running_loop())
    old, new = Stream("old", log), Stream("new", log)
    await posted(made.post, [(old.deliver, delta("a"))])
    await posted(
        made.post,
        [(old.deliver, delta("b")), (new.deliver, delta("c")), (new.deliver, EngineFailed("no"))],
    )
    await posted(made.post, [(old.deliver, delta("d"))])
    assert log == [("old", "a"), ("new", "c"), ("new", "end"), ("old", "b"), ("old", "d")]


async def test_the_step_thread_gives_way_until_a_reader_two_turns_on_has_the_first_event(no_limit):
    read, queue, woken = [], asyncio.Queue(), asyncio.Event()

    async def choice():
        await woken.wait()
        queue.put_nowait("first")

    async def client():
        read.append(await queue.get())

    tasks = [asyncio.create_task(client()), asyncio.create_task(choice())]
    await asyncio.sleep(0)
    made = Poster(asyncio.get_running_loop())

    def step():
        made.post([(lambda _: woken.set(), delta("a"))])
        return list(read)

    assert await asyncio.to_thread(step) == ["first"]
    await asyncio.gather(*tasks)


def test_beside_a_gpu_it_never_waits(log, no_limit):
    event_loop = asyncio.new_event_loop()  # which does not turn
    Poster(event_loop, gives_way=False).post([(Stream("a", log).deliver, delta("a"))])
    event_loop.close()


def test_it_does_not_wait_for_an_event_loop_that_does_not_turn(log):
    event_loop = asyncio.new_event_loop()
    Poster(event_loop).post([(Stream("a", log).deliver, delta("a"))])  # comes back
    event_loop.close()
    assert log == []


def test_only_a_first_event_is_waited_for(log, monkeypatch):
    event_loop = asyncio.new_event_loop()
    made, stream = Poster(event_loop), Stream("a", log)
    monkeypatch.setattr(poster, "MOST_WAIT_S", 0.0)
    made.post([(stream.deliver, delta("a"))])
    monkeypatch.setattr(poster, "MOST_WAIT_S", LONG_S)
    began = time.monotonic()
    made.post([(stream.deliver, delta("b"))])
    made.post([(stream.deliver, EngineFailed("no"))])
    assert time.monotonic() - began < LONG_S / 2
    event_loop.close()


async def test_a_request_that_ended_is_forgotten(log):
    made, stream = Poster(asyncio.get_running_loop()), Stream("a", log)
    await posted(made.post, [(stream.deliver, delta("a"))])
    assert len(made._begun) == 1
    await posted(made.post, [(stream.deliver, delta("b")), (stream.deliver, EngineFailed("no"))])
    assert not made._begun
    other = Stream("b", log)
    await posted(made.post, [(other.deliver, delta("a")), (other.deliver, EngineFailed("no"))])
    assert not made._begun


def test_nobody_is_told_through_an_event_loop_that_was_closed(log, no_limit):
    event_loop = asyncio.new_event_loop()
    event_loop.close()
    Poster(event_loop).post([(Stream("a", log).deliver, delta("a"))])
    assert log == []
