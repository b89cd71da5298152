"""Every family's calls are found again, however the stream is cut; what is no call stays text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import (
    FORMATS,
    HERMES,
    LLAMA_JSON,
    LLAMA_PYTHONIC,
    MISTRAL,
    format_of,
)
from agentrt.parsers_python import python_arguments, python_literal
from agentrt.types import (
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallDelta,
    ToolCallStarted,
)

NAMES = ("find", "find_all", "now")
FAMILIES = list(FORMATS.values())
every_family = pytest.mark.parametrize("form", FAMILIES, ids=lambda form: form.name)

tricky_texts = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<tool",
            "<",
            "[",
            "]",
            "{",
            "}",
            '"',
            "'",
            "\\",
            "\n",
            "a b",
            "é",
            "🙂",
            '{"name": "find"',
            "[find(",
            "<think>",
            "; ",
        ]
    ),
    max_size=6,
).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | tricky_texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
keys = st.sampled_from(["a", "b2", "_c"])
made_calls = st.lists(
    st.builds(
        ToolCall,
        st.just(""),
        st.sampled_from(NAMES),
        st.dictionaries(keys, json_values, max_size=3),
    ),
    min_size=1,
    max_size=3,
)
plain_texts = st.text("ab .\n", max_size=12)
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def events_of(parser: TurnParser, text: str, sizes: list[int]) -> list[Any]:
    """The events of a text that comes in pieces; neighbours of one kind are joined."""
    events, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        events += parser.push(text[at : at + size])
        at, turn = at + size, turn + 1
    return joined(events + parser.flush())


def joined(events: list[Any]) -> list[Any]:
    made: list[Any] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, str) and isinstance(last, str):
            made[-1] = last + event
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            made[-1] = ReasoningDelta(last.text + event.text)
        elif (
            isinstance(event, ToolCallDelta)
            and isinstance(last, ToolCallDelta)
            and event.index == last.index
        ):
            made[-1] = ToolCallDelta(event.index, event.name, last.text + event.text)
        else:
            made.append(event)
    return made


def parser_of(form: Any, **options: Any) -> TurnParser:
    return TurnParser(form, names=NAMES, **options)


@every_family
@settings(max_examples=150, deadline=None)
@given(made_calls, plain_texts, cuts)
def test_calls_parse_back_however_the_text_is_cut(form, calls, prefix, sizes) -> None:
    text = prefix + form.render(calls)
    plain, parsed = parse_turn(parser_of(form), text)
    assert plain == prefix
    assert [(call.name, call.arguments) for call in parsed] == [
        (call.name, call.arguments) for call in calls
    ]
    assert [call.id for call in parsed] == [f"call{i:05d}" for i in range(len(calls))]
    assert events_of(parser_of(form), text, sizes) == events_of(parser_of(form), text, [len(text)])


@every_family
@settings(max_examples=200, deadline=None)
@given(st.lists(tricky_texts | made_calls, max_size=4), cuts, st.booleans(), st.booleans())
def test_the_events_of_any_text_do_not_depend_on_its_cuts(
    form, parts, sizes, thinks, is_thinking
) -> None:
    text = "".join(part if isinstance(part, str) else form.render(part) for part in parts)
    options = {"thinks": thinks, "is_thinking": is_thinking}
    whole = events_of(parser_of(form, **options), text, [max(1, len(text))])
    assert events_of(parser_of(form, **options), text, sizes) == whole
    assert events_of(parser_of(form, **options), text, [1]) == whole


@every_family
@settings(max_examples=150, deadline=None)
@given(tricky_texts, cuts)
def test_no_text_is_lost_that_is_no_call(form, text, sizes) -> None:
    events = events_of(parser_of(form), text, sizes)
    if not any(isinstance(event, ToolCallArguments) for event in events):
        assert "".join(event for event in events if isinstance(event, str)) == text


@every_family
def test_arguments_stream_as_they_come_and_a_call_is_complete_when_its_json_closes(form) -> None:
    call = ToolCall("call00003", "find", {"a": "some longer text", "b2": [1, {"c": 2}]})
    text = form.render([call])
    parser = parser_of(form, first_call=3)
    seen: list[Any] = []
    first_delta_at = complete_at = None
    for at, character in enumerate(text):
        events = parser.push(character)
        if first_delta_at is None and any(isinstance(e, ToolCallDelta) for e in events):
            first_delta_at = at
        if complete_at is None and any(isinstance(e, ToolCallArguments) for e in events):
            complete_at = at
        seen += events
    assert first_delta_at is not None
    assert complete_at is not None
    assert first_delta_at < text.index("longer") < complete_at
    if form is HERMES:
        assert complete_at == text.index("\n</tool_call>") - 1
    started, delta, done, *rest = joined(seen + parser.flush())
    assert (started, done, rest) == (ToolCallStarted(0), ToolCallArguments(call), [])
    assert (delta.index, delta.name) == (0, "find")
    assert "some longer text" in delta.text


@every_family
def test_text_a_call_that_is_cut_off_and_the_end(form) -> None:
    call = ToolCall("call00000", "now", {"a": 1})
    text = form.render([call])
    assert parse_turn(parser_of(form), f"So: {text}\n") == ("So: ", (call,))
    end = text.rindex("1")
    assert parse_turn(parser_of(form), f"So: {text[:end]}") == (f"So: {text[:end]}", ())
    assert parse_turn(parser_of(form), f"{text}\n and then") == ("\n and then", (call,))


def test_hermes_calls_as_models_write_them() -> None:
    for text in (
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        '<tool_call>\n {"arguments": {}, "name": "now"}\n',
        '<tool_call>\n{"name":"now","parameters":{}, "id": 7}</tool_call>',
    ):
        assert parse_turn(parser_of(HERMES), text) == ("", (ToolCall("call00000", "now", {}),))


@pytest.mark.parametrize(
    "body",
    [
        "now()",
        '{"name": "now"}',
        '{"name": "now", "arguments": []}',
        '{"name": 3, "arguments": {}}',
        '{"name": "now", "arguments": {}, "parameters": {}}',
        '{"name": "now", "arguments": {}, "more": 1}',
        '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": "\\ud800"}}',
        "[" * 10_000,
        '{"name": "now", "arguments": ' + '{"a":' * 10_000,
    ],
)
def test_what_is_no_call_stays_text(body: str) -> None:
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert parse_turn(parser_of(HERMES), text) == (text, ())


def test_llama_json_needs_a_known_tool() -> None:
    unknown = 'Use {"name": "Bob", "parameters": {}} and {x}.'
    assert parse_turn(parser_of(LLAMA_JSON), unknown) == (unknown, ())
    text = '<|python_tag|>{"type": "function", "name": "now", "parameters": {"a": 1}}'
    assert parse_turn(parser_of(LLAMA_JSON), text)[1] == (ToolCall("call00000", "now", {"a": 1}),)
    two = '{"name": "now", "parameters": {}}; {"name": "find", "parameters": {}}'
    assert [call.name for call in parse_turn(parser_of(LLAMA_JSON), two)[1]] == ["now", "find"]


def test_pythonic_text_with_brackets_is_text() -> None:
    text = "See [1], [other(2)] and [find me]."
    assert parse_turn(parser_of(LLAMA_PYTHONIC), text) == (text, ())
    made = parse_turn(parser_of(LLAMA_PYTHONIC), "Ok [find(a='x\\'s', b2=True, _c=[None, -1.5])]")
    arguments = {"a": "x's", "b2": True, "_c": [None, -1.5]}
    assert made == ("Ok ", (ToolCall("call00000", "find", arguments),))


def test_mistral_in_each_of_its_forms() -> None:
    call = {"name": "find", "arguments": {"a": 1}}
    expected = [ToolCall("call00000", "find", call["arguments"])]
    for text in (
        '[TOOL_CALLS] [{"name": "find", "arguments": {"a": 1}, "id": "abcdefghi"}]',
        '[TOOL_CALLS]{"name": "find", "arguments": {"a": 1}}',
        '[TOOL_CALLS]find[ARGS]{"a": 1}',
        '[TOOL_CALLS]find[CALL_ID]abc[ARGS] {"a": 1}',
        '[TOOL_CALLS]find{"a": 1}',
    ):
        assert list(parse_turn(parser_of(MISTRAL), text)[1]) == expected, text


# ---- reasoning


@pytest.mark.parametrize("is_thinking", [False, True])
def test_reasoning_is_split_from_the_text(is_thinking: bool) -> None:
    text = "Hm. <tool_call> is a tag.\n</think>\n\nYes."
    text = text if is_thinking else f"\n<think>\n{text}"
    parser = parser_of(HERMES, thinks=True, is_thinking=is_thinking)
    assert events_of(parser, text, [3]) == [ReasoningDelta("Hm. <tool_call> is a tag.\n"), "Yes."]


def test_reasoning_that_never_ends_and_none_at_all() -> None:
    parser = parser_of(HERMES, thinks=True)
    assert events_of(parser, "<think>so</thin", [2]) == [ReasoningDelta("so</thin")]
    assert events_of(parser_of(HERMES, thinks=True), " <thing>", [2]) == [" <thing>"]
    assert events_of(parser_of(HERMES), "<think>a</think>", [5]) == ["<think>a</think>"]
    assert events_of(TurnParser(None), "<tool_call>{", [1]) == ["<tool_call>{"]


# ---- families


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("... <tool_call>\\n{{ call | tojson }}", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral-named"),
        ("<|python_tag|> ... {{ '\"parameters\": ' }}", "llama-json"),
        ("<|python_start|> [func_name1(x=1)]", "llama-pythonic"),
        ('Answer like {"name": its name, "parameters": what it takes}', "llama-json"),
        ('{"tool_name": ..., "parameters": {}}, {"name": "x", "parameters": {}}', None),
        ("<tool_call>\\n<function=name><parameter=x>", None),
        ("<|python_tag|> <function=name>{}</function>", None),
        ("<tool_call>name<arg_key>x</arg_key>", None),
        ("{{ message.content }}", None),
    ],
)
def test_a_template_tells_its_family(source: str, name: str | None) -> None:
    form = format_of(source)
    assert (form and form.name) == name


# ---- Python's syntax


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, json_values, max_size=3))
def test_python_arguments_read_back(arguments: dict[str, Any]) -> None:
    text = ", ".join(f"{key}={python_literal(value)}" for key, value in arguments.items())
    assert python_arguments(text) == arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=1,", {"a": 1}),
        ("a='x' \"y\"", {"a": "xy"}),
        ("a=('t', 1), b=true, c=null", {"a": ["t", 1], "b": True, "c": None}),
        (r"a='\d\x41\u00e9\ud83d\ude00'", {"a": "\\dAé😀"}),
        ("a=1, a=2", None),
        ("1", None),
        ("a=open('x')", None),
        ("a=b", None),
        ("a={1: 2}", None),
        ("a=" + "[" * 100, None),
        (r"a='\ud800'", None),
        ("a=1 b=2", None),
    ],
)
def test_python_arguments(text: str, expected: Any) -> None:
    assert python_arguments(text) == expected
