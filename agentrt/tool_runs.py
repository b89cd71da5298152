"""The calls of one step of a turn: asked for approval, started early, awaited in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import anyio
from attrs import define, evolve, field, frozen

from agentrt.errors import RequestInvalid
from agentrt.observer import Observers, Scope
from agentrt.tools import ToolSet, run_tool
from agentrt.types import ToolCall, ToolResult

Approve = Callable[[ToolCall], Awaitable["bool | str | ToolCall"]]
APPROVE_TIMEOUT_S = 300.0


@frozen
class Approval:
    """Who decides whether a call runs: True lets it, a ToolCall runs in its place, False or a text
    forbids it, and the model reads the text. So does nobody's answer within the time."""

    approve: Approve
    timeout_s: float = APPROVE_TIMEOUT_S

    async def decide(self, call: ToolCall) -> ToolCall | str:
        """The call to run, or why none runs."""
        with anyio.move_on_after(self.timeout_s):
            answer = await self.approve(call)
            if isinstance(answer, ToolCall):
                return evolve(answer, id=call.id)
            if isinstance(answer, str):
                return answer
            if isinstance(answer, bool):
                return call if answer else "it was not approved"
            raise RequestInvalid(f"approve returns a bool, a text or a ToolCall, got {answer!r}")
        return f"nobody approved it within {self.timeout_s:g} s"


@define(eq=False)
class ToolRuns:
    """Owns a task for each call. `aclose` must be called: it cancels and awaits those that run.

    A call starts at once, or, where its tool is not idempotent, when `release` says that the turn
    is complete. Approval is asked for at once. `grown` hears of each output that streams.
    """

    tools: ToolSet
    approval: Approval | None = None
    grown: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    observers: Observers = field(factory=Observers)
    scope: Scope = field(factory=Scope)
    partial: dict[str, str] = field(factory=dict, init=False)  # by call id, what streamed so far
    tasks: list[asyncio.Task[ToolResult]] = field(factory=list, init=False)
    calls: list[ToolCall] = field(factory=list, init=False)
    _released: asyncio.Event = field(factory=asyncio.Event, init=False)

    def start(self, call: ToolCall) -> None:
        """Take a call whose arguments are complete. Never waits."""
        self.calls.append(call)
        self.tasks.append(asyncio.create_task(self._run(call), name=f"tool {call.name}"))

    def release(self) -> None:
        """The turn is complete: what waited for that may start."""
        self._released.set()

    async def aclose(self) -> None:
        """Cancel what runs, and wait until it has ended."""
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            with anyio.CancelScope(shield=True):
                await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _run(self, call: ToolCall) -> ToolResult:
        started_s = self.clock()
        if self.approval is not None:
            decided = await self.approval.decide(call)
            if isinstance(decided, str):
                return ToolResult(
                    call, f"Error: not run: {decided}", True, self.clock() - started_s
                )
            call = decided
        found = self.tools.get(call.name)
        if found is not None and found.idempotent is False:
            await self._released.wait()

        def grown(text: str) -> None:
            self.partial[call.id] = text
            self.grown()

        with self.observers.tool(self.scope, call) as results:
            results.append(await run_tool(self.tools, call, clock=self.clock, grown=grown))
        return results[-1]
