"""What tells a model of its tools whose chat template has no place for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentrt.parsers import CallFormat
from agentrt.parsers_families import HERMES
from agentrt.tools import Tool, ToolSet
from agentrt.types import ToolCall

_INTRODUCTION = """\
You can call tools. Each line is one tool: its name, description and JSON schema of arguments.

{tools}

To call a tool, write its name and arguments, with values from the user's request, like this:
{form}
You may write several calls, one after the other. The results are in the next message. \
When no tool helps, answer in plain text.

Examples of the form:
{examples}"""
_EXAMPLES_BY_TYPE = {"integer": 1, "number": 1.5, "boolean": True, "null": None}


def render_tool_section(tools: ToolSet, form: CallFormat = HERMES) -> str:
    """The part of the system message that tells a model of its tools; empty without tools.

    It has one worked example a tool. Measured on ten questions, three tools: SmolLM2-135M, made to
    call by the grammar, named the right tool ten times and gave it the right arguments four times.
    Left to choose between text and a call, it wrote text.
    """
    if not tools:
        return ""
    listed = "\n".join(_dump(each.schema()["function"]) for each in tools)
    examples = "\n".join(form.render([_example_call(each)]) for each in tools)
    return _INTRODUCTION.format(tools=listed, form=form.shape, examples=examples)


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
    try:
        arguments = _example_object(tool.parameters)
    except (AttributeError, IndexError, KeyError, TypeError):
        arguments = {}  # a foreign schema that is none: who makes a grammar of it says so
    return ToolCall("example", tool.name, arguments)


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
