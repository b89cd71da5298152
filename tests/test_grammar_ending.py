"""A text that may not be longer than so many tokens is complete by then."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt import GenerateOptions
from agentrt.grammar import Constraint, json_schema, regex
from agentrt.grammar_calls import TurnShape, tool_calls
from agentrt.grammar_ending import Ending
from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import HERMES
from agentrt.tool_arguments import bind
from agentrt.tools import ToolSet, tool

NESTED = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "minLength": 3},
        "b": {"type": "array", "items": {"type": "integer", "minimum": 100}, "minItems": 2},
        "c": {
            "type": "object",
            "properties": {"long name": {"enum": ["no choice at all"]}, "d": {"type": "number"}},
            "required": ["long name"],
            "additionalProperties": False,
        },
    },
    "required": ["a"],
    "additionalProperties": False,
}
# with how many tokens (bytes) one value at least takes
SCHEMAS = [(NESTED, 12), ({}, 2), ({"type": "array", "items": NESTED}, 2), ({"type": "string"}, 2)]


@tool
def book(city: str, nights: int, guests: list[str], note: str = "") -> str:
    """Books."""
    return ""


@tool
def ask() -> str:
    """Asks."""
    return ""


TOOLS = ToolSet([book, ask])


def walk(constraint: Constraint, tokenizer: Any, seed: int, most_tokens: int) -> list[int]:
    """The tokens of a model of pure chance, up to the end of its turn or to their limit."""
    chance, tokens = np.random.default_rng(seed), []
    while len(tokens) < most_tokens and not constraint.is_finished:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        tokens.append(constraint.take(int(chance.choice(np.flatnonzero(bits)))))
        if tokens[-1] in tokenizer.eos_token_ids:
            return tokens[:-1]
    return tokens


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SCHEMAS), st.integers(0, 2**32), st.integers(0, 90))
def test_every_value_is_whole(compiler, tokenizer, sized: Any, seed: int, more: int) -> None:
    schema, max_tokens = sized[0], sized[1] + more
    constraint = compiler.compile(json_schema(schema), max_tokens)
    tokens = walk(constraint, tokenizer, seed, max_tokens)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
    assert constraint.may_end
    # the same walk with more tokens goes another way just where this one was cut short
    longer = compiler.compile(json_schema(schema), 10_000)
    is_same = walk(longer, tokenizer, seed, max_tokens) == tokens
    assert not longer.is_cut_short
    assert is_same or constraint.is_cut_short


@pytest.mark.parametrize("seed", range(8))
def test_a_way_that_stays_within_a_string_is_not_the_only_one(compiler, tokenizer, seed) -> None:
    """SmolLM2's longest token of brackets alone may always follow within a string."""
    schema = {"type": "object", "required": ["key"]}
    constraint = compiler.compile(json_schema(schema))
    (bracket,) = tokenizer.encode(")")
    orders = compiler._closing_order.copy()
    orders[0] = [bracket, *orders[0][orders[0] != bracket]]
    constraint.end_within(Ending(60, orders, min(tokenizer.eos_token_ids)))
    tokens = walk(constraint, tokenizer, seed, 60)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(75, 300), st.booleans(), st.booleans())
def test_every_call_is_whole(compiler, tokenizer, seed, max_tokens, required, parallel) -> None:
    """A call that could not be ended is not begun."""
    shape = TurnShape(required=required, parallel=parallel)
    constraint = compiler.compile(tool_calls(TOOLS, HERMES, shape), max_tokens)
    if not required:  # of pure chance, no text is ever a call
        for token in tokenizer.encode("Yes. <tool_call>\n"):
            constraint.take(token)
    tokens = walk(constraint, tokenizer, seed, max_tokens - 17 * (not required))
    assert constraint.may_end
    text = "<tool_call>\n" * (not required) + tokenizer.decode(tokens)
    plain, calls = parse_turn(TurnParser(HERMES, names=TOOLS.names), text)
    assert not plain
    assert text.count("<tool_call>\n{") == text.count("\n</tool_call>") == len(calls) >= 1
    for call in calls:
        found = TOOLS.get(call.name)
        assert found is not None
        bind(found.function, found.parameters, call.arguments)


def test_a_call_that_does_not_fit_is_not_begun(compiler, tokenizer) -> None:
    constraint = compiler.compile(tool_calls(TOOLS), 20)
    asked = tokenizer.encode("Yes. <tool_call>\n")
    *same, end = [constraint.take(token) for token in asked[:-1]]
    assert same == asked[:-2]
    assert end in tokenizer.eos_token_ids
    assert constraint.is_cut_short
    fitting = compiler.compile(tool_calls(TOOLS), 90)
    assert [fitting.take(token) for token in asked] == asked
    assert not fitting.is_cut_short


def test_what_cannot_be_whole_in_time_is_left_alone(compiler, tokenizer) -> None:
    """As is what no way is found for."""
    for grammar, max_tokens in [(json_schema(NESTED), 11), (regex("[ab]*c{9}d"), 9)]:
        constraint, free = compiler.compile(grammar, max_tokens), compiler.compile(grammar)
        assert walk(constraint, tokenizer, 1, max_tokens) == walk(free, tokenizer, 1, max_tokens)
        assert not constraint.is_cut_short


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [12, 13, 30, 60])
async def test_a_request_ends_in_time(tokenizer, temperature, max_tokens) -> None:
    """With drafts as without; that it was closed is no end of its own."""
    texts = []
    for speculation in (False, True):
        async with FakeEngine(
            num_blocks=128, tokenizer=tokenizer, speculation=speculation
        ) as engine:
            options = GenerateOptions(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=5,
                grammar=json_schema(NESTED),
                end_in_time=True,
            )
            done = await engine.generate("x", options)
        assert done.finish_reason == "length"
        texts.append(done.text)
    assert texts[0] == texts[1]
    jsonschema.validate(json.loads(texts[0]), NESTED)
