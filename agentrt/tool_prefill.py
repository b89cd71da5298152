"""Prefill of what a tool says, while it still speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import anyio.to_thread
from attrs import define, field

from agentrt.conversation import Conversation
from agentrt.errors import AgentrtError
from agentrt.observer import within
from agentrt.tool_runs import ToolRuns
from agentrt.types import ToolResult

LEAST_TOKENS = 32  # what is worth a request of its own


@define(eq=False)
class ToolPrefill:
    """Computes the KV of the next prompt as far as it is known, one request at a time.

    The first call without a result decides: what later ones say stands behind it. `prefill` is the
    engine's.
    """

    conversation: Conversation
    runs: ToolRuns
    prefill: Callable[[Sequence[int]], Awaitable[None]]
    _news: asyncio.Event = field(factory=asyncio.Event, init=False)

    def grown(self) -> None:
        """A tool said more."""
        self._news.set()

    async def run(self) -> None:
        """Runs until it is cancelled. For observers its requests are those of the tools' turn."""
        with within(self.runs.scope):
            await self._run()

    async def _run(self) -> None:
        num_computed = len(self.conversation.log.ids)
        while True:
            await self._news.wait()
            self._news.clear()
            ids = await anyio.to_thread.run_sync(self._known)  # long texts take long to encode
            if len(ids) >= num_computed + LEAST_TOKENS:
                try:
                    await self.prefill(ids)
                except AgentrtError:
                    return  # the prompt that follows meets the same, and tells the caller
                num_computed = len(ids)

    def _known(self) -> list[int]:
        results: list[ToolResult] = []
        for call, task in zip(self.runs.calls, self.runs.tasks, strict=True):
            if not task.done():
                partial = self.runs.partial.get(call.id)
                return [] if partial is None else self.conversation.ahead(results, call, partial)
            if task.cancelled() or task.exception() is not None:
                return []
            results.append(task.result())
        return []
