"""The messages of a Chat Completions body, as our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attrs import evolve

from agentrt.adapters.openai import fields
from agentrt.adapters.openai.fields import MOST_DEPTH, Required, Table
from agentrt.adapters.openai.refusal import Refusal, unsupported
from agentrt.parsers import CallFormat
from agentrt.types import Message, ToolCall

MOST_MESSAGES = 100_000
_TEXT_ONLY = "the model reads text"


def read_content(value: Any, path: str) -> str:
    """A text, or a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong_type(path, "a string or an array of parts", value)
    return "".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(value))


def _read_part(value: Any, path: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise unsupported(f"{path}.type", f"{_TEXT_ONLY}, not {kind}")
    part = fields.by_tag("type", _PARTS)(value, path)
    return str(part.get("text", part.get("refusal", "")))


_OTHER_PARTS = ("image_url", "input_audio", "file", "input_image", "input_file")
_BREAKPOINT = fields.only("the cache finds every common prefix by itself")
_PARTS: dict[str, Table] = {
    "text": {"text": Required(fields.text), "prompt_cache_breakpoint": _BREAKPOINT},
    "input_text": {"text": Required(fields.text), "prompt_cache_breakpoint": _BREAKPOINT},
    "output_text": {
        "text": Required(fields.text),
        "annotations": fields.only("the model reads text alone", []),
        "logprobs": lambda value, path: value,  # what an earlier answer said of its tokens
    },
    "refusal": {"refusal": Required(fields.text)},
}


def read_arguments(value: Any, path: str) -> dict[str, Any]:
    """The arguments of a call, which come as a text of JSON."""
    text = fields.text(value, path)
    try:
        made = json.loads(text, parse_constant=fields.no_constant)
        json.dumps(made, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise fields.wrong_value(path, "a JSON object as text", text) from exc
    if not isinstance(made, dict) or _depth(made) > MOST_DEPTH:
        raise fields.wrong_value(path, "a JSON object as text", text)
    return made


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


_FUNCTION: Table = {
    "name": Required(fields.short_text(64, 1)),
    "arguments": Required(read_arguments),
}
_CALL: Table = {"id": Required(fields.text), "function": Required(fields.nested(_FUNCTION))}
_NAME = fields.short_text(256)
_CONTENT = Required(read_content)
_NO_CALL = fields.only("use tool_calls")
_MESSAGES: dict[str, Table] = {
    "system": {"content": _CONTENT, "name": _NAME},
    "developer": {"content": _CONTENT, "name": _NAME},
    "user": {"content": _CONTENT, "name": _NAME},
    "assistant": {
        "content": read_content,
        "name": _NAME,
        "refusal": fields.text,
        "tool_calls": fields.listed(fields.by_tag("type", {"function": _CALL}), 1024),
        "function_call": _NO_CALL,
        "audio": fields.only(_TEXT_ONLY),
        "annotations": fields.only(_TEXT_ONLY, []),
        # Chat templates leave the thoughts of earlier turns out.
        "reasoning_content": fields.text,
    },
    "tool": {"content": _CONTENT, "tool_call_id": Required(fields.text)},
}


def read_messages(value: Any, path: str) -> tuple[Message, ...]:
    """The messages. Results must answer calls that were made before."""
    rows = fields.listed(fields.by_tag("role", _MESSAGES), MOST_MESSAGES, least=1)(value, path)
    called: dict[str, str] = {}
    made = []
    for index, row in enumerate(rows):
        message = _message(row, called, f"{path}[{index}]")
        called |= {call.id: call.name for call in message.tool_calls}
        made.append(message)
    return tuple(made)


def _message(row: dict[str, Any], called: dict[str, str], path: str) -> Message:
    role: Any = row["role"]  # one of the table's
    if role == "tool":
        return result_message(row["tool_call_id"], row["content"], called, f"{path}.tool_call_id")
    if role != "assistant":
        role = "system" if role == "developer" else role
        return Message(role=role, content=row["content"], name=row.get("name"))
    calls = tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in row.get("tool_calls", ())
    )
    content = row.get("content", row.get("refusal"))
    if content is None and not calls:
        raise Refusal(f"{path}.content is missing: an answer has text or calls", f"{path}.content")
    return Message(role="assistant", content=content or "", tool_calls=calls, name=row.get("name"))


def result_message(call_id: str, content: str, called: dict[str, str], path: str) -> Message:
    """The result of a call that was made before."""
    if call_id not in called:
        raise Refusal(f"{path}: no call before has the id {call_id!r}", path, "invalid_value")
    return Message(role="tool", content=content, name=called[call_id], tool_call_id=call_id)


def as_written(messages: Sequence[Message], form: CallFormat) -> list[Message]:
    """Calls as the model itself wrote them, where its family's templates take them as text: so the
    rendered conversation begins with what the model has read and written before."""
    if not form.keeps_text:
        return list(messages)
    return [
        evolve(message, content=message.content + form.render(message.tool_calls), tool_calls=())
        if message.tool_calls
        else message
        for message in messages
    ]
