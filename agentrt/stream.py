"""TokenStream: one request's events on the caller's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from attrs import define, field

from agentrt.types import Completion, Finished, StreamEvent, TextDelta


@define(eq=False)
class TokenStream:
    """An async iterator of TextDelta, and Finished last. Leaving it early cancels the request.

    Events come from the step thread through `deliver`, on the event loop. A slow consumer finds
    deltas merged, so at most one delta and the final event wait.
    """

    _cancel: Callable[[], None]
    _delta: TextDelta | None = field(default=None, init=False)
    _end: Finished | BaseException | None = field(default=None, init=False)
    _exhausted: bool = field(default=False, init=False)
    _wake: asyncio.Event = field(factory=asyncio.Event, init=False)

    def deliver(self, event: StreamEvent | BaseException) -> None:
        """Take an event, or the error that ends the request."""
        if isinstance(event, TextDelta):
            old = self._delta
            if old is not None:
                event = TextDelta(
                    old.text + event.text,
                    old.token_ids + event.token_ids,
                    old.logprobs + event.logprobs,
                )
            self._delta = event
        else:
            self._end = event
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        while self._delta is None and self._end is None:
            self._wake.clear()
            await self._wake.wait()
        if self._delta is not None:
            event, self._delta = self._delta, None
            return event
        if self._exhausted:
            raise StopAsyncIteration
        self._exhausted = True
        if isinstance(self._end, Finished):
            return self._end
        assert self._end is not None
        raise self._end

    async def collect(self) -> Completion:
        """Wait for the end. Cancelling this cancels the request."""
        try:
            while self._end is None:
                self._wake.clear()
                await self._wake.wait()
        finally:
            self.close()
        if isinstance(self._end, Finished):
            return self._end.completion
        raise self._end

    def close(self) -> None:
        """Cancel the request if it has not ended. Never waits."""
        if self._end is None:
            self._cancel()
