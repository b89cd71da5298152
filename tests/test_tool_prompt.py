from __future__ import annotations

import json
from typing import Literal

import pytest

from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import FORMATS, HERMES
from agentrt.tool_arguments import bind
from agentrt.tool_prompt import render_tool_section
from agentrt.tools import ToolSet, tool
from agentrt.types import ToolCall


@tool
def find(
    city: str,
    unit: Literal["km", "mile"],
    spots: list[tuple[str, int]],
    near: dict[str, bool] | None = None,
    days: int = 3,
) -> str:
    """Finds places.

    Args:
        city: Where.
    """
    return ""


@tool
def now() -> str:
    """The time."""
    return ""


def test_the_section_lists_each_tool_and_an_example_that_binds() -> None:
    section = render_tool_section(ToolSet([find, now]))
    for each in (find, now):
        assert json.dumps(each.schema()["function"]) in section
    _, examples = section.split("Examples of the form:\n")
    plain, calls = parse_turn(TurnParser(HERMES), examples)
    assert plain == ""
    assert [call.name for call in calls] == ["find", "now"]
    bound = bind(find.function, find.parameters, calls[0].arguments)
    assert bound == {"city": "...", "unit": "km", "spots": [("...", 1)]}
    assert render_tool_section(ToolSet()) == ""


def test_a_foreign_schema_has_an_example_too() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "examples": ["x1"]},
            "b": {"anyOf": [{"const": 4}]},
            "c": {"type": "object", "properties": {"d": {"type": ["boolean", "null"]}}},
            "e": True,
        },
    }
    made = tool(name="foreign")(now.function)
    made = type(made)(name="foreign", description="", parameters=schema, function=now.function)
    example = parse_turn(
        TurnParser(HERMES), render_tool_section(ToolSet([made])).split("form:\n")[1]
    )[1][0]
    assert example.arguments == {"a": "x1", "b": 4, "c": {"d": True}, "e": "..."}


@pytest.mark.parametrize(
    "schema",
    [
        {"required": [{"type": "string"}]},
        {"properties": {"a": {"enum": {"b": 1}}}},
        {"properties": {"a": {"type": []}}},
        {"properties": ["a"], "required": ["a"]},
    ],
)
def test_what_is_no_schema_has_an_example_without_arguments(schema: dict[str, object]) -> None:
    made = type(now)(name="foreign", description="", parameters=schema, function=now.function)
    example = render_tool_section(ToolSet([made])).split("form:\n")[1]
    assert parse_turn(TurnParser(HERMES), example)[1][0].arguments == {}


def test_a_call_renders_as_the_model_writes_it() -> None:
    call = ToolCall("call_0", "find", {"city": "Zürich", "days": 2})
    assert HERMES.render([call]) == (
        '<tool_call>\n{"name": "find", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_the_section_shows_the_form_of_each_family(form) -> None:
    section = render_tool_section(ToolSet([find, now]), form)
    assert form.shape in section
    examples = section.split("Examples of the form:\n")[1]
    calls = [
        call
        for line in examples.split("\n")
        for call in parse_turn(TurnParser(form, names=("find", "now")), line)[1]
    ]
    if form is not HERMES:  # whose calls take three lines
        assert [call.name for call in calls] == ["find", "now"]
