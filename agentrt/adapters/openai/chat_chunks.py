"""A Chat Completions answer: chunks of what the choices say, and the whole that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import define, field, frozen

from agentrt.adapters.openai.telling import (
    CallBegun,
    CallText,
    Ended,
    Said,
    Text,
    Thought,
)
from agentrt.adapters.openai.tokens import Tally, shown_logprobs
from agentrt.tokenizer import Tokenizer


@frozen(kw_only=True)
class ChatHeader:
    """What stands in every chunk of one answer."""

    id: str
    created_s: int
    model: str

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created_s,
            "model": self.model,
            "choices": list(choices),
        }


@define
class ChoiceChunks:
    """One choice's parts as entries of `choices`, in chunks. The first one names the role."""

    index: int
    tokenizer: Tokenizer
    shows_logprobs: bool
    _has_role: bool = field(default=False, init=False)

    def entries(self, said: Sequence[Said]) -> list[dict[str, Any]]:
        return [entry for part in said if (entry := self._entry(part)) is not None]

    def _entry(self, part: Said) -> dict[str, Any] | None:
        reason, logprobs, delta = None, None, _delta(part)
        if isinstance(part, Ended):
            reason = part.reason
        elif not delta:
            return None
        if isinstance(part, Text) and self.shows_logprobs:
            logprobs = {
                "content": shown_logprobs(self.tokenizer, part.logprobs),
                "refusal": None,
            }
        if not self._has_role:
            self._has_role = True
            delta = {"role": "assistant", "content": None, **delta}
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(part: Said) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"content": part.text}
    if isinstance(part, Thought):
        return {"reasoning_content": part.text}
    if isinstance(part, CallBegun):
        function = {"name": part.name, "arguments": ""}
        call = {"index": part.number, "id": part.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    if isinstance(part, CallText):
        return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}
    return {}


@define
class WholeChoice:
    """The sum of one choice's entries, as an answer that is not streamed has it."""

    index: int
    content: str | None = None
    reasoning: str | None = None
    calls: list[dict[str, Any]] = field(factory=list)
    logprobs: list[dict[str, Any]] | None = None
    reason: str | None = None

    def add(self, entry: dict[str, Any]) -> None:
        delta = entry["delta"]
        if delta.get("content") is not None:
            self.content = (self.content or "") + delta["content"]
        if "reasoning_content" in delta:
            self.reasoning = (self.reasoning or "") + delta["reasoning_content"]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self.calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                self.calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if entry["logprobs"] is not None:
            self.logprobs = (self.logprobs or []) + entry["logprobs"]["content"]
        self.reason = entry["finish_reason"] or self.reason

    def shown(self) -> dict[str, Any]:
        content = self.content
        if content is None and not self.calls:
            content = ""
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = None if self.logprobs is None else {"content": self.logprobs, "refusal": None}
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.reason,
        }


def whole_completion(
    header: ChatHeader,
    choices: Sequence[WholeChoice],
    usage: dict[str, Any],
    metadata: dict[str, str] | None,
) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    body = {
        **header.chunk([choice.shown() for choice in choices]),
        "object": "chat.completion",
        "usage": usage,
    }
    return body if metadata is None else {**body, "metadata": metadata}


def chat_usage(tally: Tally) -> dict[str, Any]:
    """What an answer cost; its prompt counts once, however many choices it has."""
    return {
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.output_tokens,
        "total_tokens": tally.total_tokens,
        "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": tally.reasoning_tokens},
    }
