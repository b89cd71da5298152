"""The output of a response, item by item, and the events of it in the documented order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

from attrs import define, field

from agentrt.adapters.openai.telling import (
    CallBegun,
    CallEnded,
    CallText,
    Ended,
    Said,
    Text,
    Thought,
)
from agentrt.adapters.openai.tokens import shown_logprobs
from agentrt.tokenizer import Tokenizer

Event = dict[str, Any]
Kind = Literal["message", "reasoning"]
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


@define(eq=False)
class OutputItems:
    """State: `items`, in order; the last one is open until another begins or the end comes."""

    tokenizer: Tokenizer
    items: list[dict[str, Any]] = field(factory=list, init=False)
    # Drawn before the first token comes: a draw lets go of the interpreter's lock, and behind a
    # first token it took up to 5 ms to come back while a step was prepared.
    _id: str = field(factory=lambda: uuid4().hex, init=False)
    _is_open: bool = field(default=False, init=False)

    def push(self, said: Sequence[Said]) -> list[Event]:
        """The events of these parts."""
        return [event for part in said for event in self._events(part)]

    def _events(self, part: Said) -> list[Event]:
        if isinstance(part, Text):
            logprobs = shown_logprobs(self.tokenizer, part.logprobs)
            begun = self._begun("message")
            self._part["logprobs"] += logprobs
            return [*begun, self._told(part.text, logprobs=logprobs)]
        if isinstance(part, Thought):
            return [*self._begun("reasoning"), self._told(part.text)]
        if isinstance(part, CallBegun):
            return self._call_begun(part)
        if isinstance(part, CallText):
            self.items[-1]["arguments"] += part.text
            return [self._event("response.function_call_arguments.delta", delta=part.text)]
        if isinstance(part, CallEnded):
            return self._closed("completed")
        assert isinstance(part, Ended)
        is_whole = part.reason in ("stop", "tool_calls")
        return self._closed("completed" if is_whole else "incomplete")

    @property
    def _part(self) -> dict[str, Any]:
        """The one part of the open message or reasoning."""
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id}{len(self.items):x}"

    def _event(self, kind: str, **more: Any) -> Event:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **where, **more}

    def _told(self, text: str, **more: Any) -> Event:
        part = self._part
        part["text"] += text
        return self._event(f"response.{part['type']}.delta", content_index=0, delta=text, **more)

    def _begun(self, kind: Kind) -> list[Event]:
        """Open an item of this kind, unless one is open."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        events = self._closed("completed")
        part: dict[str, Any] = {"type": _PARTS[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item: dict[str, Any] = {"id": self._new_id("msg"), "role": "assistant"}
        else:
            item = {"id": self._new_id("rs"), "summary": []}
        events.append(self._opened({**item, "type": kind, "content": []}))
        events.append(self._event("response.content_part.added", content_index=0, part=dict(part)))
        self.items[-1]["content"] = [part]
        return events

    def _call_begun(self, part: CallBegun) -> list[Event]:
        events = self._closed("completed")
        item = {"type": "function_call", "id": self._new_id("fc"), "call_id": part.id}
        return [*events, self._opened({**item, "name": part.name, "arguments": ""})]

    def _opened(self, item: dict[str, Any]) -> Event:
        item = {**item, "status": "in_progress"}
        self.items.append(item)
        self._is_open = True
        # A copy: the item goes on changing.
        return {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": dict(item),
        }

    def _closed(self, status: str) -> list[Event]:
        """Close the open item, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        done = {
            "type": "response.output_item.done",
            "output_index": len(self.items) - 1,
            "item": item,
        }
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            return [self._event(kind, arguments=item["arguments"]), done]
        part = self._part
        said = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        kind = f"response.{part['type']}.done"
        return [
            self._event(kind, content_index=0, text=part["text"], **said),
            self._event("response.content_part.done", content_index=0, part=part),
            done,
        ]
