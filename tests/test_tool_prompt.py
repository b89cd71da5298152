from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.tool_arguments import bind
from agentrt.tool_prompt import CallScanner, parse_calls, render_call, render_tool_section
from agentrt.tools import ToolSet, tool
from agentrt.types import ToolCall, ToolCallArguments, ToolCallStarted


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
    plain, calls = parse_calls(examples)
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
    example = parse_calls(render_tool_section(ToolSet([made])).split("form:\n")[1])[1][0]
    assert example.arguments == {"a": "x1", "b": 4, "c": {"d": True}, "e": "..."}


def test_a_call_renders_as_the_model_writes_it() -> None:
    call = ToolCall("call_0", "find", {"city": "Zürich", "days": 2})
    assert render_call(call) == (
        '<tool_call>\n{"name": "find", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
tricky_texts = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "<tool", "<", '"', "\\", "\n", "a b", "é"]),
    max_size=6,
).map("".join)
calls_made = st.builds(
    ToolCall,
    st.just(""),
    st.sampled_from(["find", "now"]),
    st.dictionaries(tricky_texts, json_values | tricky_texts, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(calls_made, max_size=3),
    tricky_texts.filter(lambda text: "<tool_call>" not in text and not text.endswith("<")),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
def test_calls_parse_back_however_the_text_is_cut(
    calls: list[ToolCall], prefix: str, sizes: list[int]
) -> None:
    text = prefix + "\n".join(map(render_call, calls))
    plain, parsed = parse_calls(text)
    assert plain == prefix
    assert [(call.name, call.arguments) for call in parsed] == [
        (call.name, call.arguments) for call in calls
    ]
    assert [call.id for call in parsed] == [f"call_{index}" for index in range(len(calls))]
    assert _join(_scan(text, sizes)) == _join(_scan(text, [len(text) or 1]))


@settings(max_examples=100, deadline=None)
@given(tricky_texts, st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_no_text_is_lost_that_is_no_call(text: str, sizes: list[int]) -> None:
    events = _scan(text, sizes)
    assert "".join(event for event in events if isinstance(event, str)) == text


def _scan(text: str, sizes: list[int]) -> list[Any]:
    scanner, events, at = CallScanner(), [], 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        events += scanner.push(text[at : at + size])
        at += size
    return events + scanner.flush()


def _join(events: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for event in events:
        if isinstance(event, str) and joined and isinstance(joined[-1], str):
            joined[-1] += event
        else:
            joined.append(event)
    return joined


def test_text_is_held_back_only_while_it_may_open_a_call() -> None:
    scanner = CallScanner("x")
    assert scanner.push("Look: <to") == ["Look: "]
    assert scanner.push("p> <tool_call") == ["<top> "]
    assert scanner.push('>\n{"name": "now", ') == [ToolCallStarted(0)]
    assert scanner.push('"arguments": {}}\n</tool_call') == []
    assert scanner.push(">\n") == [ToolCallArguments(ToolCall("x0", "now", {}))]
    assert scanner.push("<tool_call>") == [ToolCallStarted(1)]
    assert scanner.push('{"name": "now", "arguments": {}}</tool_call>\n then') == [
        ToolCallArguments(ToolCall("x1", "now", {})),
        "\n then",
    ]
    assert scanner.flush() == []


@pytest.mark.parametrize(
    "body",
    [
        "now()",
        '{"name": "now"}',
        '{"name": "now", "arguments": []}',
        '{"name": 3, "arguments": {}}',
        '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": "\\ud800"}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_call_stays_text(body: str) -> None:
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert parse_calls(text) == (text, ())


def test_a_call_that_is_cut_off_is_text() -> None:
    text = 'So: <tool_call>\n{"name": "now", "argu'
    assert parse_calls(text) == (text, ())
