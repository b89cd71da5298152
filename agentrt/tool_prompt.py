"""The default tool format, for models whose chat template has none: as text, there and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from agentrt.tools import Tool, ToolSet
from agentrt.types import ToolCall, ToolCallArguments, ToolCallStarted

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

ScanEvent = str | ToolCallStarted | ToolCallArguments

_INTRODUCTION = """\
You can call tools. Each line is one tool: its name, description and JSON schema of arguments.

{tools}

To call a tool, write its name and arguments, with values from the user's request, like this:
{form}
You may write several calls, one after the other. The results are in the next message. \
When no tool helps, answer in plain text.

Examples of the form:
{examples}"""
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_EXAMPLES_BY_TYPE = {"integer": 1, "number": 1.5, "boolean": True, "null": None}


def render_tool_section(tools: ToolSet) -> str:
    """The part of the system message that tells a model of its tools; empty without tools.

    It has one worked example a tool. Measured on ten questions, three tools: SmolLM2-135M, made to
    call by the grammar, named the right tool ten times and gave it the right arguments four times.
    Left to choose between text and a call, it wrote text.
    """
    if not tools:
        return ""
    listed = "\n".join(_dump(each.schema()["function"]) for each in tools)
    form = f'{OPEN_TAG}\n{{"name": ..., "arguments": {{...}}}}\n{CLOSE_TAG}'
    examples = "\n".join(render_call(_example_call(each)) for each in tools)
    return _INTRODUCTION.format(tools=listed, form=form, examples=examples)


def render_call(call: ToolCall) -> str:
    """A call as the model would write it."""
    body = _dump({"name": call.name, "arguments": dict(call.arguments)})
    return f"{OPEN_TAG}\n{body}\n{CLOSE_TAG}"


def render_result(content: str) -> str:
    """A tool's result as the model reads it, in a message of the user.

    Measured on eight turns of an airline's agent: in these words, SmolLM2-135M told all eight
    results to the customer. It told none of them where the message had the role "tool" or the
    result stood alone: it wrote code, or calls of its own making.
    """
    return f"The tool says: {content}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _example_call(tool: Tool) -> ToolCall:
    return ToolCall("example", tool.name, _example_object(tool.parameters))


def _example_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    names = schema.get("required") or list(properties)
    return {name: _example(properties.get(name, {})) for name in names}


def _example(schema: Any) -> Any:
    """A value that fits the schema, as far as its keywords are those of `agentrt.tool_schema`.

    A text is "...": SmolLM2-135M copies a telling one ("the city") into its calls.
    """
    if not isinstance(schema, Mapping):
        return "..."
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    if schema.get("anyOf"):
        return _example(schema["anyOf"][0])
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "object":
        return _example_object(schema)
    if kind == "array":
        first = schema.get("prefixItems") or [schema.get("items", {})]
        return [_example(item) for item in first]
    return _EXAMPLES_BY_TYPE.get(kind, "...")


def parse_calls(text: str, id_prefix: str = "call_") -> tuple[str, tuple[ToolCall, ...]]:
    """The plain text of a finished turn, and its calls with the ids `call_0`, `call_1`, ..."""
    scanner = CallScanner(id_prefix)
    events = [*scanner.push(text), *scanner.flush()]
    plain = "".join(event for event in events if isinstance(event, str))
    return plain, tuple(event.call for event in events if isinstance(event, ToolCallArguments))


class CallScanner:
    """Splits a turn's text, as it streams, into plain text and calls.

    Text is held back only while it may be the start of a call. White space around calls belongs to
    the format and is dropped after one. What looks like a call but is not well-formed, or is cut
    off, comes out as plain text, word for word: `ToolCallStarted` is then without its arguments.
    """

    # State: _held is the text that no event has covered yet, without the open tag when _in_call;
    # in a call the first _searched characters of it hold no end of the call. _after_call says that
    # only white space came since the last call.

    def __init__(self, id_prefix: str = "call_") -> None:
        self._id_prefix = id_prefix
        self._held = ""
        self._in_call = False
        self._after_call = False
        self._searched = 0
        self._num_calls = 0

    def push(self, text: str) -> list[ScanEvent]:
        """Takes the next piece of text and returns what it settles."""
        self._held += text
        events: list[ScanEvent] = []
        while self._end_call(events) if self._in_call else self._open_call(events):
            pass
        return events

    def flush(self) -> list[ScanEvent]:
        """Ends the turn: what is still held back is plain text."""
        left = OPEN_TAG + self._held if self._in_call else self._held
        if self._after_call and not left.strip():
            left = ""
        self._held, self._in_call, self._after_call, self._searched = "", False, False, 0
        return [left] if left else []

    def _open_call(self, events: list[ScanEvent]) -> bool:
        """Passes plain text on, up to the next open tag; True if there was one."""
        at = self._held.find(OPEN_TAG)
        ready = at if at >= 0 else len(self._held) - _num_tag_characters(self._held)
        if self._after_call and not self._held[:ready].strip():
            if at < 0:
                return False  # white space after a call: dropped, if another call or the end comes
            self._held, at, ready = self._held[ready:], 0, 0
        if ready:
            events.append(self._held[:ready])
            self._after_call = False
        self._held = self._held[ready:]
        if at < 0:
            return False
        self._held = self._held[len(OPEN_TAG) :]
        self._in_call, self._after_call, self._searched = True, False, 0
        events.append(ToolCallStarted(self._num_calls))
        return True

    def _end_call(self, events: list[ScanEvent]) -> bool:
        """Takes a call up to its close tag; False while that has not come."""
        at = self._held.find(CLOSE_TAG, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(self._held) - len(CLOSE_TAG) + 1)
            return False
        body, end = self._held[:at], at + len(CLOSE_TAG)
        if '"' in _JSON_STRING.sub("", body):
            self._searched = end  # this tag stands inside an argument's text
            return True
        call = _parse_call(body, f"{self._id_prefix}{self._num_calls}")
        self._held, self._in_call, self._searched = self._held[end:], False, 0
        if call is None:
            events.append(f"{OPEN_TAG}{body}{CLOSE_TAG}")
        else:
            events.append(ToolCallArguments(call))
            self._num_calls += 1
            self._after_call = True
        return True


def _num_tag_characters(text: str) -> int:
    """How many characters at the end of the text may be the start of an open tag."""
    longest = min(len(text), len(OPEN_TAG) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(OPEN_TAG[:n])), 0)


def _parse_call(body: str, call_id: str) -> ToolCall | None:
    """The call in a body, or None if it is not well-formed."""
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
        _dump(parsed).encode()  # a lone surrogate fits no tokenizer
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or set(parsed) != {"name", "arguments"}:
        return None
    name, arguments = parsed["name"], parsed["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(call_id, name, arguments)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
