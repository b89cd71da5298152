"""How the step thread's events reach the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, field

from agentrt.types import TextDelta

Sink = Callable[[Any], None]
Events = list[tuple[Sink, Any]]

# Turns of the event loop from a delivery to the event in the hands of who reads an openai client:
# the task of a choice, then the client's own. Whoever reads `Engine.stream` has it after one.
TURNS = 2
MOST_WAIT_S = 0.003  # also where the event loop is held up by something else


@define(eq=False)
class Poster:
    """Wakes the event loop once for a whole step's events. Those of requests that had none yet go
    first, and where `gives_way` the step thread lets them pass.

    It would else go on to its next step with the interpreter's lock, while the event loop wakes: to
    take the lock back cost the switch interval of 5 ms in one of ten first events (2 cores). Not so
    beside a GPU, which would wait too, and where the step thread soon waits for it.

    State: `_begun`, of the step thread: sinks that had an event, and not their last one yet.
    """

    _event_loop: asyncio.AbstractEventLoop
    gives_way: bool = True
    _begun: set[Sink] = field(factory=set, init=False)

    def post(self, events: Events) -> None:
        """Called on the step thread: hand the events over."""
        first, others = self._parted(events)
        is_out = threading.Event()
        try:
            self._event_loop.call_soon_threadsafe(self._deliver, first, others, is_out)
        except RuntimeError:  # the event loop was closed under us: nobody is left to tell
            return
        if first and self.gives_way:
            is_out.wait(MOST_WAIT_S)

    def _parted(self, events: Events) -> tuple[Events, Events]:
        """The events of requests that begin, and the others; each request's in order."""
        told = {sink for sink, event in events if isinstance(event, TextDelta)}
        beginning = told - self._begun
        self._begun |= beginning
        self._begun.difference_update(
            sink for sink, event in events if not isinstance(event, TextDelta)
        )
        if not beginning:
            return [], events
        first = [each for each in events if each[0] in beginning]
        return first, [each for each in events if each[0] not in beginning]

    def _deliver(self, first: Events, others: Events, is_out: threading.Event) -> None:
        _hand_out(first)
        if first:  # before the others, whose readers so run behind it
            self._event_loop.call_soon(self._turned, TURNS, is_out)
        _hand_out(others)

    def _turned(self, num_turns: int, is_out: threading.Event) -> None:
        if num_turns == 1:
            is_out.set()
        else:
            self._event_loop.call_soon(self._turned, num_turns - 1, is_out)


def _hand_out(events: Sequence[tuple[Sink, Any]]) -> None:
    for sink, event in events:
        sink(event)


def poster(
    event_loop: asyncio.AbstractEventLoop, *, gives_way: bool = True
) -> Callable[[Events], None]:
    """A `post` that wakes `event_loop` once for a whole step's events: see Poster."""
    return Poster(event_loop, gives_way).post
