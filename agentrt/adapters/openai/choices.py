"""The answers to one request: tasks that generate, and one stream of what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import anyio
from attrs import define, evolve, field, frozen

from agentrt.guards import Stop
from agentrt.parsers import TurnParser
from agentrt.screen import Screen
from agentrt.types import (
    Completion,
    Finished,
    GenerateOptions,
    SessionEvent,
    StreamEvent,
    TextDelta,
    TokenLogprob,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agentrt.engine import Engine
    from agentrt.stream import TokenStream

MOST_WAITING = 64  # batches that a slow reader lets pile up before the engine's deltas are merged


@frozen(kw_only=True)
class Batch:
    """What one delta of the engine settled. The last one of a choice has `completion`, or where a
    guard ended it, `stopped`. `is_changed` says that guards changed some of the choice so far."""

    index: int
    events: tuple[SessionEvent, ...] = ()
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None
    stopped: Stop | None = None
    is_changed: bool = False


@frozen(kw_only=True)
class Plan:
    """One choice to generate."""

    ids: NDArray[np.int32]
    options: GenerateOptions
    parser: TurnParser
    screen: Screen | None
    is_rewritten: bool


@define(eq=False)
class Choices:
    """Owns a task a choice. `aclose` cancels them and waits; any task may call it, also while
    another one waits for the next batch, which then hears of the end."""

    engine: Engine
    plans: Sequence[Plan]
    _batches: asyncio.Queue[Batch | Exception | None] = field(init=False)
    _tasks: list[asyncio.Task[None]] = field(factory=list, init=False)
    _num_running: int = field(default=0, init=False)

    @_batches.default
    def _empty(self) -> asyncio.Queue[Batch | Exception | None]:
        return asyncio.Queue(MOST_WAITING)

    async def start(self) -> Self:
        """Submit what is to be generated. Raises what `Engine.stream` raises."""
        streams: list[TokenStream] = []
        try:
            for plan in self.plans:
                made = await self.engine.submit(
                    plan.ids, plan.options, is_rewritten=plan.is_rewritten
                )
                streams.append(made)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        self._num_running = len(streams)
        self._tasks = [
            asyncio.create_task(self._run(index, stream)) for index, stream in enumerate(streams)
        ]
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        while self._num_running or not self._batches.empty():
            batch = await self._batches.get()
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                break
            if batch.completion is not None or batch.stopped is not None:
                self._num_running -= 1
            return batch
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what still runs, in the engine too, before its next step."""
        self._num_running = 0
        for task in self._tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._batches.empty():
            self._batches.get_nowait()
        self._batches.put_nowait(None)

    async def _run(self, index: int, stream: TokenStream) -> None:
        try:
            async for event in stream:
                batch = await _batch(index, self.plans[index], event)
                await self._batches.put(batch)
                if batch.stopped is not None:
                    return
        except Exception as exc:  # whoever reads the batches gets it
            await self._batches.put(exc)
        finally:
            stream.close()


async def _batch(index: int, plan: Plan, event: StreamEvent) -> Batch:
    """What an event of the engine settles, as far as the guards let it through."""
    is_last = isinstance(event, Finished)
    parts = plan.parser.flush() if isinstance(event, Finished) else plan.parser.push(event.text)
    shown: list[SessionEvent] = [
        TextDelta(part, ()) if isinstance(part, str) else part for part in parts
    ]
    screen = plan.screen
    if screen is not None:
        shown = await screen.push(shown, is_last=is_last)
    settled = Batch(
        index=index,
        events=tuple(shown),
        stopped=None if screen is None else screen.stopped,
        is_changed=screen is not None and screen.is_changed,
    )
    if isinstance(event, Finished):
        return evolve(settled, completion=event.completion)
    return evolve(settled, num_tokens=len(event.token_ids), logprobs=event.logprobs)
