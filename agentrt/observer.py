"""Observers: who is told what a running engine does, and for which agent it does it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from attrs import define, field, frozen

if TYPE_CHECKING:
    from agentrt.request import Request
    from agentrt.scheduler import Plan
    from agentrt.types import FinishReason, StreamEvent, ToolCall, ToolResult


@frozen
class Scope:
    """For whom something is done: the agent's name ("" if nobody said it), and the number of the
    turn that it is part of, if it is."""

    agent: str = ""
    turn: int | None = None


_scope: ContextVar[Scope | None] = ContextVar("agentrt_scope", default=None)


def current_scope() -> Scope:
    """For whom the running code asks."""
    return _scope.get() or Scope()


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """What is asked inside the block is asked for `scope`."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def agent(name: str) -> AbstractContextManager[None]:
    """Requests and new sessions inside the block are those of the agent `name`, for observers."""
    return within(Scope(name))


async def scoped(scope: Scope, stream: AsyncGenerator[StreamEvent]) -> AsyncGenerator[StreamEvent]:
    """The same events; what the stream does up to its first one is done for `scope`.

    The scope is never left set while the consumer runs: it shares our context.
    """
    token = _scope.set(scope)
    try:
        first = await anext(stream)
    finally:
        _scope.reset(token)
    yield first
    async for event in stream:
        yield event


class Observer:
    """Is told what happens, and when on the engine's clock. Does nothing of itself: override.

    `launched`, `collected` and `ended` are called on the step thread, the others by the caller's
    task, in its context. None may block or raise: what it raises on the step thread ends the
    engine.
    """

    def submitted(self, request: Request, scope: Scope, now: float) -> None:
        """A request goes to the step thread."""

    def launched(self, plan: Plan, now: float) -> None:
        """A step was handed to the device; its work counts as computed."""

    def collected(self, plan: Plan, now: float) -> None:
        """The tokens of a step are known."""

    def ended(self, request: Request, outcome: FinishReason | BaseException, now: float) -> None:
        """A request ended, with a completion or an error."""

    def turn_began(self, scope: Scope, now: float) -> None:
        """A turn of a session begins."""

    def turn_ended(self, scope: Scope, error: BaseException | None, now: float) -> None:
        """It ended, or was cancelled or failed with `error`."""

    def tool_began(self, scope: Scope, call: ToolCall, now: float) -> None:
        """A tool starts; called in the task that runs it."""

    def tool_ended(
        self, scope: Scope, call: ToolCall, result: ToolResult | None, now: float
    ) -> None:
        """It ended; without a result it was cancelled, or is a tool that the caller runs."""


@define(eq=False)
class Observers:
    """The observers of one engine. Changed on the event loop, read by any thread: `_all` is only
    ever replaced."""

    clock: Callable[[], float] = time.monotonic
    _all: tuple[Observer, ...] = field(default=(), init=False)
    _numbers: Iterator[int] = field(factory=lambda: itertools.count(1), init=False)

    def new_name(self) -> str:
        """For a session whose agent nobody named."""
        return f"session {next(self._numbers)}"

    def new_turn(self, agent_name: str) -> Scope:
        """The scope of a turn that begins."""
        return Scope(agent_name, next(self._numbers))

    @contextmanager
    def attached(self, observer: Observer) -> Iterator[None]:
        """Tell `observer` of what happens during the block."""
        self._all = (*self._all, observer)
        try:
            yield
        finally:
            self._all = tuple(each for each in self._all if each is not observer)

    def tell(self, event: Callable[[Observer], None]) -> None:
        """Call `event` with each observer."""
        for observer in self._all:
            event(observer)

    @contextmanager
    def submission(self, request: Request) -> Iterator[None]:
        """The block hands a request to the step thread, or fails."""
        scope = current_scope()
        self.tell(lambda each: each.submitted(request, scope, request.submitted_s))
        try:
            yield
        except BaseException as exc:
            error = exc
            self.tell(lambda each: each.ended(request, error, self.clock()))
            raise

    @contextmanager
    def turn(self, scope: Scope) -> Iterator[None]:
        """The block is a turn."""
        self.tell(lambda each: each.turn_began(scope, self.clock()))
        error: BaseException | None = None
        try:
            yield
        except BaseException as exc:
            error = exc
            raise
        finally:
            ended = error
            self.tell(lambda each: each.turn_ended(scope, ended, self.clock()))

    @contextmanager
    def tool(self, scope: Scope, call: ToolCall) -> Iterator[list[ToolResult]]:
        """The block runs a tool, and puts its result into the list."""
        results: list[ToolResult] = []
        self.tell(lambda each: each.tool_began(scope, call, self.clock()))
        try:
            yield results
        finally:
            result = results[-1] if results else None
            self.tell(lambda each: each.tool_ended(scope, call, result, self.clock()))
