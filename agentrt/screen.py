"""Output guards over one generation of a session: its text, its reasoning and its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import evolve

from agentrt.guards import Guard, GuardedText, Stop, guarded
from agentrt.parsers import parse_json
from agentrt.parsers_families import call_json
from agentrt.types import (
    ReasoningDelta,
    SessionEvent,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallDelta,
    ToolCallStarted,
)


class Screen:
    """Lets through what guards let through.

    Text and reasoning come as they are decided, without token ids, which would tell the text. A
    call comes whole, decided as JSON; its deltas do not come. Text before a call is decided before
    it. After a Stop nothing comes.
    """

    # State: _text and _reasoning, in flight; _pieces, what was let through, in order; is_changed
    # and stopped, of all so far.

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards
        self._text = GuardedText(guards, "answer")
        self._reasoning = GuardedText(guards, "reasoning")
        self._pieces: list[str | ToolCall] = []
        self.is_changed = False
        self.stopped: Stop | None = None

    async def push(self, events: Sequence[SessionEvent], *, is_last: bool) -> list[SessionEvent]:
        """Take events of a parser, and return those that may be shown now."""
        shown: list[SessionEvent] = []
        for event in events:
            if self.stopped is None:
                shown += await self._take(event)
        if is_last:
            shown += await self._end_reasoning()
            shown += await self._end_text()
        return shown

    def content(self, render: Callable[[Sequence[ToolCall]], str]) -> str:
        """What was let through, as the model would have written it."""
        return "".join(
            piece if isinstance(piece, str) else f"{render([piece])}\n" for piece in self._pieces
        ).rstrip()

    async def _take(self, event: SessionEvent) -> list[SessionEvent]:
        if isinstance(event, ReasoningDelta):
            text = await self._reasoning.push(event.text)
            self._note(self._reasoning)
            return [ReasoningDelta(text)] if text else []
        shown = await self._end_reasoning()
        if isinstance(event, TextDelta):
            return [*shown, *self._shown(await self._text.push(event.text), self._text)]
        if isinstance(event, ToolCallDelta):
            return shown
        shown += await self._end_text()
        if self.stopped is not None:
            return shown
        if isinstance(event, ToolCallArguments):
            call = await self._call(event.call)
            return shown if call is None else [*shown, ToolCallArguments(call)]
        assert isinstance(event, ToolCallStarted)
        return [*shown, event]

    async def _call(self, call: ToolCall) -> ToolCall | None:
        raw = call_json(call)
        text, self.stopped = await guarded(raw, self._guards, "call")
        if self.stopped is None and text != raw:
            self.is_changed = True
            call = self._edited(call, text)
        if self.stopped is not None:
            return None
        self._pieces.append(call)
        return call

    def _edited(self, call: ToolCall, text: str) -> ToolCall:
        made = parse_json(text)
        if (
            isinstance(made, dict)
            and isinstance(made.get("name"), str)
            and isinstance(made.get("arguments"), dict)
        ):
            return evolve(call, name=made["name"], arguments=made["arguments"])
        self.stopped = Stop("a guard changed a tool call into something else")
        return call

    async def _end_text(self) -> list[SessionEvent]:
        """Decide the text so far. A new one begins after a call."""
        ending, self._text = self._text, GuardedText(self._guards, "answer")
        if self.stopped is not None:
            return []
        return self._shown(await ending.finish(), ending)

    async def _end_reasoning(self) -> list[SessionEvent]:
        if not self._reasoning.raw:
            return []
        ending, self._reasoning = self._reasoning, GuardedText(self._guards, "reasoning")
        if self.stopped is not None:
            return []
        text = await ending.finish()
        self._note(ending, is_whole=True)
        return [ReasoningDelta(text)] if text else []

    def _shown(self, text: str, source: GuardedText) -> list[SessionEvent]:
        self._note(source, is_whole=source is not self._text)
        if not text:
            return []
        self._pieces.append(text)
        return [TextDelta(text, ())]

    def _note(self, source: GuardedText, *, is_whole: bool = False) -> None:
        if source.stopped is not None:
            self.stopped = source.stopped
        if is_whole and source.is_changed:
            self.is_changed = True
