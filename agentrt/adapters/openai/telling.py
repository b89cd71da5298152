"""What one choice says, in parts that both forms of an answer show: text, thoughts, calls."""

from __future__ import annotations

import json
from typing import Literal
from uuid import uuid4

from attrs import define, field, frozen

from agentrt.adapters.openai.choices import Batch
from agentrt.types import (
    Completion,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallDelta,
    ToolCallStarted,
)

EndReason = Literal["stop", "length", "tool_calls", "content_filter"]


@frozen
class Text:
    """More text, and the log-probabilities of its tokens where they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@frozen
class Thought:
    """More of what the model thinks first."""

    text: str


@frozen
class CallBegun:
    """A call of this tool."""

    number: int
    id: str
    name: str


@frozen
class CallText:
    """More of the newest call's arguments, as JSON."""

    number: int
    text: str


@frozen
class CallEnded:
    """The newest call is complete."""

    number: int


@frozen
class Ended:
    """The choice is complete; a guard's end has no completion."""

    reason: EndReason
    completion: Completion | None


Said = Text | Thought | CallBegun | CallText | CallEnded | Ended


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other ids."""
    return uuid4().hex[:9]


@define(eq=False)
class Telling:
    """Takes one choice's batches. `streams_calls` says that the model writes arguments as JSON, so
    that they can be passed on as they come; else a call comes whole.

    Log-probabilities go with the text that their tokens became; those of calls and of the end of
    the turn are left out. A call that is cut off stays as far as it was told.
    """

    streams_calls: bool
    eos_token_ids: frozenset[int]
    tool_names: list[str] = field(factory=list, init=False)  # of the complete calls
    thoughts: str = field(default="", init=False)
    num_tokens: int = field(default=0, init=False)
    _pending: list[TokenLogprob] = field(factory=list, init=False)
    _number: int = field(default=0, init=False)  # of the next call
    _is_told: bool = field(default=False, init=False)  # the newest call began, and has not ended

    def push(self, batch: Batch) -> list[Said]:
        """What this batch adds."""
        self.num_tokens += batch.num_tokens
        self._pending += (
            each for each in batch.logprobs if each.token_id not in self.eos_token_ids
        )
        said: list[Said] = []
        for event in batch.events:
            if isinstance(event, TextDelta):
                said += self._text(event.text)
            elif isinstance(event, ReasoningDelta):
                self._pending.clear()
                self.thoughts += event.text
                said.append(Thought(event.text))
            elif isinstance(event, ToolCallDelta):
                said += self._call_text(event)
            elif isinstance(event, ToolCallArguments):
                said += self._call(event.call)
            else:
                assert isinstance(event, ToolCallStarted)
                self._pending.clear()
        if batch.completion is not None or batch.stopped is not None:
            said.append(Ended(self._reason(batch), batch.completion))
        return said

    def _text(self, text: str) -> list[Said]:
        if self._is_told:  # the rest of a call that was cut off: its beginning is no text any more
            return []
        logprobs, self._pending = tuple(self._pending), []
        return [Text(text, logprobs)]

    def _call_text(self, event: ToolCallDelta) -> list[Said]:
        self._pending.clear()
        if not self.streams_calls or not (event.name or self._is_told):
            return []
        more: list[Said] = [CallText(self._number, event.text)]
        if not self._is_told:
            self._is_told = True
            more.insert(0, CallBegun(self._number, new_call_id(), event.name))
        return more

    def _call(self, call: ToolCall) -> list[Said]:
        self._pending.clear()
        number, was_told = self._number, self._is_told
        self._number, self._is_told = number + 1, False
        self.tool_names.append(call.name)
        if was_told:
            return [CallEnded(number)]
        text = json.dumps(dict(call.arguments), ensure_ascii=False)
        begun = CallBegun(number, new_call_id(), call.name)
        return [begun, CallText(number, text), CallEnded(number)]

    def _reason(self, batch: Batch) -> EndReason:
        if batch.stopped is not None:
            return "content_filter"
        assert batch.completion is not None
        if batch.completion.finish_reason == "length":
            return "length"
        return "tool_calls" if self.tool_names else "stop"
