"""An engine for callers that are not async, or on another event loop than its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.from_thread
from attrs import frozen

from agentrt.engine import Engine
from agentrt.errors import RequestInvalid

if TYPE_CHECKING:
    from agentrt.adapters.answers import Answer, Answers
    from agentrt.adapters.openai.wanted import Wanted

T = TypeVar("T")
_END = object()


@frozen
class Bridge:
    """Runs coroutines on the event loop of an open engine, from wherever it is called."""

    engine: Engine
    _event_loop: asyncio.AbstractEventLoop

    @classmethod
    def here(cls, engine: Engine) -> Bridge:
        """Of an engine that was opened on the running event loop. Raises RequestInvalid without."""
        try:
            return cls(engine, asyncio.get_running_loop())
        except RuntimeError as exc:
            raise RequestInvalid(
                "no event loop runs here: make this inside `async with Engine()`, or use "
                "`with agentrt.adapters.blocking.blocking_engine() as engine`"
            ) from exc

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it, blocking. Raises RequestInvalid on the engine's own event loop, where
        nothing could go on meanwhile."""
        if self._is_here():
            work.close()
            raise RequestInvalid(
                "this blocks the event loop that the engine runs on: await the async method"
            )
        waiting = asyncio.run_coroutine_threadsafe(work, self._event_loop)
        try:
            return waiting.result()
        except BaseException:
            waiting.cancel()
            raise

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it, on any event loop."""
        if self._is_here():
            return await work
        waiting = asyncio.run_coroutine_threadsafe(work, self._event_loop)
        return await asyncio.wrap_future(waiting)

    def iterate(self, make: Callable[[], AsyncGenerator[T]]) -> Iterator[T]:
        """The items of an async generator, blocking between them; leaving closes it."""
        items = make()
        try:
            while (item := self.run(_next(items))) is not _END:
                yield item
        finally:
            self.run(_close(items))

    async def stream(self, make: Callable[[], AsyncGenerator[T]]) -> AsyncGenerator[T]:
        """The same on any event loop."""
        items = make()
        try:
            while (item := await self.call(_next(items))) is not _END:
                yield item
        finally:
            await self.call(_close(items))

    def whole(self, answers: Answers, request: Wanted) -> Answer:
        """A whole answer, blocking."""
        return self.run(answers.whole(request))

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._event_loop
        except RuntimeError:
            return False


async def _next(items: AsyncGenerator[Any]) -> Any:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[Any]) -> None:
    await items.aclose()


@contextmanager
def blocking_engine(*arguments: Any, **settings: Any) -> Iterator[Bridge]:
    """An engine on an event loop in a thread of its own, as long as the block; arguments are those
    of `Engine`. An Engine that is not open yet may be given instead."""
    engine = arguments[0] if arguments and isinstance(arguments[0], Engine) else None
    if engine is None:
        engine = Engine(*arguments, **settings)
    with (
        anyio.from_thread.start_blocking_portal("asyncio") as portal,
        portal.wrap_async_context_manager(engine),
    ):
        yield Bridge(engine, portal.call(_running_loop))


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def bridge_of(engine: Engine | Bridge) -> Bridge:
    """The bridge to an engine that was opened here, or one that there is."""
    return engine if isinstance(engine, Bridge) else Bridge.here(engine)
