"""Responses that were stored, for those that go on from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from agentrt.adapters.openai.input_items import Item, shown
from agentrt.adapters.openai.messages import read_arguments
from agentrt.adapters.openai.refusal import Refusal
from agentrt.types import Message, ToolCall

if TYPE_CHECKING:
    from agentrt.adapters.openai.responses_request import ResponsesRequest

MOST_RESPONSES = 1024
MOST_CHARACTERS = 1 << 26  # of the messages of all of them


@frozen
class Stored:
    """A response, what it was made from but for the instructions (as items, and with its own
    message as messages), and its conversation."""

    response: Mapping[str, Any]
    items: tuple[Item, ...]
    messages: tuple[Message, ...]
    affinity: str
    num_characters: int


@define(eq=False)
class Responses:
    """Owns the stored responses, least recently used first. Invariant: they hold
    `MOST_RESPONSES` and, but for the newest one, `MOST_CHARACTERS` at most."""

    _by_id: OrderedDict[str, Stored] = field(factory=OrderedDict, init=False)
    _num_characters: int = field(default=0, init=False)

    def add(self, request: ResponsesRequest, response: Mapping[str, Any]) -> None:
        """Store a complete response."""
        messages = request.wanted.messages
        if request.instructions is not None:
            messages = messages[1:]
        messages = (*messages, _said(response["output"]))
        size = sum(len(message.content) for message in messages)
        assert request.wanted.affinity is not None
        items = (*request.earlier, *shown(request.items))
        affinity = request.wanted.affinity
        self._by_id[response["id"]] = Stored(response, items, messages, affinity, size)
        self._num_characters += size
        while len(self._by_id) > 1 and (
            len(self._by_id) > MOST_RESPONSES or self._num_characters > MOST_CHARACTERS
        ):
            _, gone = self._by_id.popitem(last=False)
            self._num_characters -= gone.num_characters

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Raises Refusal for one that is unknown, was not stored or is long gone."""
        if response_id not in self._by_id:
            raise Refusal(
                f"response {response_id!r} is not stored: it was deleted, made with store=false, "
                f"or is not among the last {MOST_RESPONSES}",
                param,
                "response_not_found" if param is None else "previous_response_not_found",
                status=404 if param is None else 400,
            )
        self._by_id.move_to_end(response_id)
        return self._by_id[response_id]

    def delete(self, response_id: str) -> None:
        """Raises Refusal as `get` does."""
        self._num_characters -= self.get(response_id).num_characters
        del self._by_id[response_id]


def _said(output: Sequence[Mapping[str, Any]]) -> Message:
    """The model's message, of the items that it became. A call that was cut off is left out: no
    result can answer it."""
    text, calls = "", []
    for item in output:
        if item["type"] == "message":
            text += item["content"][0]["text"]
        elif item["type"] == "function_call" and item["status"] == "completed":
            arguments = read_arguments(item["arguments"], "arguments")
            calls.append(ToolCall(item["call_id"], item["name"], arguments))
    return Message(role="assistant", content=text, tool_calls=tuple(calls))
