"""How the step thread's events reach the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

Sink = Callable[[Any], None]


def poster(event_loop: asyncio.AbstractEventLoop) -> Callable[[list[tuple[Sink, Any]]], None]:
    """A `post` that wakes `event_loop` once for a whole step's events."""

    def deliver(events: list[tuple[Sink, Any]]) -> None:
        for sink, event in events:
            sink(event)

    def post(events: list[tuple[Sink, Any]]) -> None:
        try:
            event_loop.call_soon_threadsafe(deliver, events)
        except RuntimeError:  # the event loop was closed under us: nobody is left to tell
            return

    return post
