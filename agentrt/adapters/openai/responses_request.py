"""A Responses body, checked field by field, as what the engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from agentrt.adapters.openai import fields, settings
from agentrt.adapters.openai.fields import Required, Table
from agentrt.adapters.openai.input_items import Item
from agentrt.adapters.openai.messages import (
    MOST_MESSAGES,
    read_arguments,
    read_content,
    result_message,
)
from agentrt.adapters.openai.refusal import Refusal, unsupported
from agentrt.adapters.openai.settings import CHOICES, FUNCTION, Choice
from agentrt.adapters.openai.wanted import Wanted
from agentrt.tools import ToolSet
from agentrt.types import Message, ToolCall

LOGPROBS = "message.output_text.logprobs"
_TEXT_ONLY = "the model reads and writes text"
_STATUS = fields.one_of("in_progress", "completed", "incomplete")


def _read_item(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and "type" not in value:
        value = {"type": "message", **value}
    item: dict[str, Any] = fields.by_tag("type", _ITEMS)(value, path)
    return item


def _anything(value: Any, path: str) -> Any:
    """What an earlier answer said, and no model reads again: its thoughts."""
    return value


_ITEMS: dict[str, Table] = {
    "message": {
        "role": Required(fields.one_of("user", "assistant", "system", "developer")),
        "content": Required(read_content),
        "id": fields.text,
        "status": _STATUS,
        "phase": fields.one_of("commentary", "final_answer"),
    },
    "function_call": {
        "call_id": Required(fields.text),
        "name": Required(fields.short_text(64, 1)),
        "arguments": Required(read_arguments),
        "id": fields.text,
        "status": _STATUS,
    },
    "function_call_output": {
        "call_id": Required(fields.text),
        "output": Required(read_content),
        "id": fields.text,
        "name": fields.text,
        "status": _STATUS,
    },
    "reasoning": {
        "id": fields.text,
        "summary": _anything,
        "content": _anything,
        "status": _STATUS,
        "encrypted_content": fields.only("thoughts are not encrypted here"),
    },
}


def _read_input(value: Any, path: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    items: list[dict[str, Any]] = fields.listed(_read_item, MOST_MESSAGES, 1)(value, path)
    return items


def _read_choice(value: Any, path: str) -> Choice:
    if isinstance(value, str):
        return CHOICES[fields.one_of(*CHOICES)(value, path)]
    row = fields.by_tag("type", _CHOICES)(value, path)
    if row["type"] == "function":
        return settings.named_choice(row["name"])
    return settings.allowed_choice(row["mode"], [each["name"] for each in row["tools"]])


def _read_tool(value: Any, path: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"{path}.type", "tools are functions that the caller runs")
    tool: dict[str, Any] = fields.by_tag("type", {"function": FUNCTION})(value, path)
    return tool


def _read_format(value: Any, path: str) -> str | None:
    row = fields.by_tag("type", _FORMATS)(value, path)
    if row["type"] == "text":
        return None
    schema = row["schema"] if row["type"] == "json_schema" else {"type": "object"}
    return settings.json_answer(schema, f"{path}.schema")


_NAMED: Table = {"name": Required(settings.NAME)}
_CHOICES: dict[str, Table] = {
    "function": _NAMED,
    "allowed_tools": {
        "mode": Required(fields.one_of("auto", "required")),
        "tools": Required(
            fields.listed(fields.by_tag("type", {"function": _NAMED}), settings.MOST_TOOLS, 1)
        ),
    },
}
_FORMATS: dict[str, Table] = {
    "text": fields.NOTHING,
    "json_object": fields.NOTHING,
    "json_schema": {
        "name": Required(settings.NAME),
        "schema": Required(lambda value, path: value),
        "description": fields.text,
        "strict": fields.flag,
    },
}
_REASONING: Table = {
    name: fields.only("how much the model thinks is its own", "none")
    for name in ("effort", "summary", "generate_summary")
}
_TEXT: Table = {
    "format": _read_format,
    "verbosity": fields.only("the model's length is its own", "medium"),
}
FIELDS: Table = {
    **settings.SHARED,
    "input": Required(_read_input),
    "background": fields.only("an answer lives as long as its request", False),
    "context_management": fields.only("the token log is exact"),
    "conversation": fields.only("use previous_response_id"),
    "include": fields.listed(fields.only("there is nothing else to include", LOGPROBS), 8),
    "instructions": fields.text,
    "max_output_tokens": fields.whole(1, settings.MOST_TOKENS),
    "max_tool_calls": fields.only("there are no tools of our own to count"),
    "previous_response_id": fields.text,
    "prompt": fields.only("prompts are not stored"),
    "reasoning": fields.nested(_REASONING),
    "store": fields.flag,
    "stream_options": fields.nested(
        {"include_obfuscation": fields.only("nothing leaves this process", False)}
    ),
    "text": fields.nested(_TEXT),
    "tool_choice": _read_choice,
    "tools": fields.listed(_read_tool, settings.MOST_TOOLS),
    "truncation": fields.only("shorten the input yourself", "disabled"),
}


@frozen(kw_only=True)
class ResponsesRequest:
    """One checked body. `wanted.messages` are the instructions and the new input alone: what went
    before is put between them by `following`."""

    model: str
    wanted: Wanted
    instructions: str | None
    previous_response_id: str | None
    items: tuple[dict[str, Any], ...]
    streams: bool
    stores: bool
    echo: Mapping[str, Any]  # what the response repeats of the body
    earlier: tuple[Item, ...] = ()  # of the responses before: what they read and wrote

    def following(
        self, before: Sequence[Message], affinity: str, earlier: Sequence[Item] = ()
    ) -> ResponsesRequest:
        """The same after the messages and items of the responses before."""
        messages = (*before, *_messages(self.items, before))
        if self.instructions is not None:
            messages = (Message(role="system", content=self.instructions), *messages)
        affinity = self.wanted.affinity or affinity
        wanted = evolve(self.wanted, messages=messages, affinity=affinity)
        return evolve(self, wanted=wanted, earlier=tuple(earlier))


def _messages(items: Sequence[Mapping[str, Any]], before: Sequence[Message]) -> list[Message]:
    """An answer and its calls, which are items of their own, become one message."""
    called = {call.id: call.name for message in before for call in message.tool_calls}
    made: list[Message] = []
    for index, item in enumerate(items):
        if item["type"] == "function_call":
            call = ToolCall(item["call_id"], item["name"], item["arguments"])
            called[call.id] = call.name
            if not made or made[-1].role != "assistant":
                made.append(Message(role="assistant", content=""))
            made[-1] = evolve(made[-1], tool_calls=(*made[-1].tool_calls, call))
        elif item["type"] == "function_call_output":
            path = f"input[{index}].call_id"
            made.append(result_message(item["call_id"], item["output"], called, path))
        elif item["type"] == "message":
            role: Any = "system" if item["role"] == "developer" else item["role"]
            made.append(Message(role=role, content=item["content"]))
    return made


def read_responses_request(value: Any) -> ResponsesRequest:
    """Raises Refusal, naming the field, for what is unknown, wrong, or cannot be served."""
    body = fields.read_object(value, "", FIELDS)
    wants_logprobs = LOGPROBS in body.get("include", ())
    if "top_logprobs" in body and not wants_logprobs:
        raise Refusal(f"top_logprobs needs include to have {LOGPROBS}", "top_logprobs")
    if "stream_options" in body and not body.get("stream"):
        raise Refusal("stream_options needs stream to be true", "stream_options", "invalid_value")
    tools = ToolSet([settings.tool_of(row) for row in body.get("tools", ())])
    choice: Choice = body.get("tool_choice", settings.ANY_TOOL)
    wanted = Wanted(
        messages=(),
        tools=tools,
        callable_tools=settings.chosen_tools(tools, choice, "tool_choice"),
        required=choice.required,
        parallel=body.get("parallel_tool_calls", True) and not choice.single,
        answer=body.get("text", {}).get("format"),
        options=settings.generate_options(body, logprobs=wants_logprobs),
        max_tokens=body.get("max_output_tokens"),
        affinity=body.get("prompt_cache_key", body.get("user")),
    )
    return ResponsesRequest(
        model=body["model"],
        wanted=wanted,
        instructions=body.get("instructions"),
        previous_response_id=body.get("previous_response_id"),
        items=tuple(body["input"]),
        streams=body.get("stream", False),
        stores=body.get("store", True),
        echo=_echo(value),
    )


def _echo(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a response repeats, with the API's defaults."""
    defaults: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": None,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "safety_identifier": None,
        "temperature": 1.0,
        "text": {},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": None,
        "top_p": 1.0,
        "user": None,
    }
    echo = {
        name: default if value.get(name) is None else value[name]
        for name, default in defaults.items()
    }
    echo["text"] = {"format": {"type": "text"}, **echo["text"]}
    echo["tools"] = [{"parameters": None, "strict": None, **tool} for tool in echo["tools"]]
    return {**echo, "truncation": "disabled", "reasoning": {"effort": None, "summary": None}}
