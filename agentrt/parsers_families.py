"""The formats of tool calls that families of models were trained on, and which one a model has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from agentrt.parsers import CallFormat, TurnParser
from agentrt.parsers_cursor import Wait
from agentrt.parsers_python import python_arguments, python_literal
from agentrt.types import ToolCall

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
MISTRAL_TAG, ARGUMENTS_TAG, ID_TAG = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
PYTHON_TAG = "<|python_tag|>"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def call_json(call: ToolCall, key: str = "arguments") -> str:
    """A call as one JSON object, as most families write it."""
    return _dump({"name": call.name, key: dict(call.arguments)})


# ---- <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>


def _read_tagged(parser: TurnParser) -> Wait:
    parser.started()
    if not (yield from parser.call_object(is_tagged=True)):
        return False
    return (yield from parser.after_call(close=CLOSE_TAG))


def _render_tagged(calls: Sequence[ToolCall]) -> str:
    return "\n".join(f"{OPEN_TAG}\n{call_json(call)}\n{CLOSE_TAG}" for call in calls)


# ---- {"name": ..., "parameters": {...}}; {...}


def _read_llama_json(parser: TurnParser) -> Wait:
    cursor = parser.cursor
    if cursor.held[: cursor.at] == "{":
        cursor.at = 0
    else:
        yield from cursor.skip_space()
    if not (yield from parser.call_object(is_tagged=False)):
        cursor.at = max(cursor.at, 1)
        return False
    return (yield from parser.after_call(separator=";"))


def _render_llama_json(calls: Sequence[ToolCall]) -> str:
    return "; ".join(call_json(call, "parameters") for call in calls)


# ---- [name(key=value, ...), ...]


def _read_pythonic(parser: TurnParser) -> Wait:
    cursor, num_calls = parser.cursor, 0
    while True:
        name = yield from cursor.name()
        if not parser.is_tool(name) or not name or not (yield from cursor.reads("(")):
            return False
        parser.started()
        cursor.at -= 1
        begin = cursor.at + 1
        if not (yield from parser.streamed(name, cursor.balanced("\"'"))):
            return False
        arguments = python_arguments(cursor.held[begin : cursor.at - 1])
        if arguments is None:
            return False
        parser.finished(name, arguments)
        num_calls += 1
        yield from cursor.skip_space()
        if (yield from cursor.reads("]")):
            cursor.settle()
            return (yield from parser.after_call())
        if not (yield from cursor.reads(",")):
            return False
        yield from cursor.skip_space()


def _render_pythonic(calls: Sequence[ToolCall]) -> str:
    return "[" + ", ".join(map(_render_python_call, calls)) + "]"


def _render_python_call(call: ToolCall) -> str:
    arguments = (f"{key}={python_literal(value)}" for key, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


# ---- [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], and [TOOL_CALLS]name[ARGS]{...}


def _read_mistral(parser: TurnParser) -> Wait:
    cursor = parser.cursor
    yield from cursor.skip_space()
    if (yield from cursor.reads("[")):
        is_call = yield from _read_mistral_list(parser)
    elif (yield from cursor.sees(("{",))):
        parser.started()
        is_call = yield from parser.call_object(is_tagged=True)
    else:
        is_call = yield from _read_mistral_named(parser)
    return is_call and (yield from parser.after_call())


def _read_mistral_list(parser: TurnParser) -> Wait:
    cursor = parser.cursor
    while True:
        yield from cursor.skip_space()
        parser.started()
        if not (yield from parser.call_object(is_tagged=True)):
            return False
        yield from cursor.skip_space()
        if (yield from cursor.reads("]")):
            cursor.settle()
            return True
        if not (yield from cursor.reads(",")):
            return False


def _read_mistral_named(parser: TurnParser) -> Wait:
    cursor = parser.cursor
    name = yield from cursor.name()
    if not name:
        return False
    if (yield from cursor.reads(ID_TAG)):
        yield from cursor.name()
    yield from cursor.reads(ARGUMENTS_TAG)
    yield from cursor.skip_space()
    if (yield from cursor.sees(("{",))) is None:
        return False
    parser.started()
    begin = cursor.at
    if not (yield from parser.streamed(name, cursor.json_value())):
        return False
    body = f'{{"name": {_dump(name)}, "arguments": {cursor.held[begin : cursor.at]}}}'
    return parser.finish_call(body)


def _render_mistral(calls: Sequence[ToolCall]) -> str:
    return f"{MISTRAL_TAG} [{', '.join(map(call_json, calls))}]"


def _render_mistral_named(calls: Sequence[ToolCall]) -> str:
    return "".join(
        f"{MISTRAL_TAG}{call.name}{ARGUMENTS_TAG}{_dump(dict(call.arguments))}" for call in calls
    )


HERMES = CallFormat(
    name="hermes",
    shape=f'{OPEN_TAG}\n{{"name": ..., "arguments": {{...}}}}\n{CLOSE_TAG}',
    opens=(OPEN_TAG,),
    read=_read_tagged,
    render=_render_tagged,
)
LLAMA_JSON = CallFormat(
    name="llama-json",
    shape='{"name": ..., "parameters": {...}}',
    opens=(PYTHON_TAG, "{"),
    read=_read_llama_json,
    render=_render_llama_json,
)
LLAMA_PYTHONIC = CallFormat(
    name="llama-pythonic",
    shape="[name(argument=value, ...)]",
    opens=("[",),
    read=_read_pythonic,
    render=_render_pythonic,
)
MISTRAL = CallFormat(
    name="mistral",
    shape=f'{MISTRAL_TAG} [{{"name": ..., "arguments": {{...}}}}]',
    opens=(MISTRAL_TAG,),
    read=_read_mistral,
    render=_render_mistral,
    keeps_text=False,  # its templates count turns, and take calls in a message's own field alone
)
MISTRAL_NAMED = CallFormat(
    name="mistral-named",
    shape=f"{MISTRAL_TAG}name{ARGUMENTS_TAG}{{...}}",
    opens=(MISTRAL_TAG,),
    read=_read_mistral,
    render=_render_mistral_named,
    keeps_text=False,
)
FORMATS: Mapping[str, CallFormat] = MappingProxyType(
    {each.name: each for each in (HERMES, LLAMA_JSON, LLAMA_PYTHONIC, MISTRAL, MISTRAL_NAMED)}
)

# What tells a template's family, the first that it holds. Some have call tags of a family around a
# form of their own: their tools are told in the system message, in our default form.
_MARKS = (
    ("<function=", None),
    ("<arg_key>", None),
    (ARGUMENTS_TAG, MISTRAL_NAMED),
    (MISTRAL_TAG, MISTRAL),
    (OPEN_TAG, HERMES),
    ("<|python_start|>", LLAMA_PYTHONIC),
    ("[func_name", LLAMA_PYTHONIC),
    (PYTHON_TAG, LLAMA_JSON),
)
# Llama's words: {"name": function name, "parameters": dictionary of argument name and its value}
_LLAMA_JSON_SHOWN = re.compile(r'\{"name": [^{}"]*"parameters"')


def format_of(template_source: str) -> CallFormat | None:
    """The format that a chat template shows calls in; None where it knows of none."""
    for mark, form in _MARKS:
        if mark in template_source:
            return form
    return LLAMA_JSON if _LLAMA_JSON_SHOWN.search(template_source) else None
