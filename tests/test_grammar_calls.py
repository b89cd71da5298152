"""The grammar of each family: its parser reads what it lets through; no other text looks so."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from agentrt.errors import GrammarInvalid
from agentrt.grammar import Constraint, GrammarCompiler
from agentrt.grammar_calls import MAX_CALLS, TurnShape, text_without_calls, tool_calls
from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import FORMATS, HERMES, LLAMA_JSON, LLAMA_PYTHONIC, MISTRAL
from agentrt.structured import output_form
from agentrt.tool_arguments import bind
from agentrt.tools import Tool, ToolSet, tool
from agentrt.types import ReasoningDelta, ToolCall, ToolCallArguments

SPECIAL = ["<|endoftext|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>"]
END = 1


@tool
def plan(
    city: str,
    unit: Literal["km", "mile"],
    stops: list[int],
    fast: bool,
    tags: dict[str, bool] | None = None,
    pair: tuple[str, bool] = ("a", True),
    level: Literal[1, 2, True, None] = 1,
) -> str:
    """Plans a trip <to a place>."""
    return ""


@tool
def plan_all(days: int = 3) -> str:
    """Plans all."""
    return ""


TOOLS = ToolSet([plan, plan_all])
CALL = ToolCall("", "plan", {"city": "Oslo </b> é", "unit": "km", "stops": [1, -20], "fast": True})
FAMILIES = list(FORMATS.values())
every_family = pytest.mark.parametrize("form", FAMILIES, ids=lambda form: form.name)
with_specials = pytest.mark.parametrize("has_special", [False, True], ids=["text", "special"])


def made_tokenizer(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [form.render([CALL, ToolCall("", "plan_all", {})]) for form in FAMILIES]
    made.train_from_iterator(texts * 4, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    return made


@pytest.fixture(scope="module")
def tokenizers() -> dict[bool, Tokenizer]:
    return {False: made_tokenizer(SPECIAL[:2]), True: made_tokenizer(SPECIAL)}


@pytest.fixture(scope="module")
def compilers(tokenizers: dict[bool, Tokenizer]) -> dict[bool, GrammarCompiler]:
    return {
        key: GrammarCompiler(made, made.get_vocab_size(), {END}) for key, made in tokenizers.items()
    }


def shape_of(has_special: bool, **shape: Any) -> TurnShape:
    special = {text: index for index, text in enumerate(SPECIAL)} if has_special else {}
    return TurnShape(special=special, **shape)


def takes(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return all(constraint.accept(token) for token in tokens) and constraint.may_end


def parsed(form: Any, text: str, **options: Any) -> tuple[str, tuple[ToolCall, ...]]:
    return parse_turn(TurnParser(form, names=TOOLS.names, **options), text)


def walk(constraint: Constraint, tokenizer: Tokenizer, chance: random.Random) -> str:
    """A random walk through the masks; it leans to the tokens that end things."""
    ends = {token for text, token in tokenizer.get_vocab().items() if set(text) & set("\"'}])>")}
    tokens: list[int] = []
    while END not in tokens:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        options = [int(token) for token in np.flatnonzero(bits)]
        assert options
        likely = [each for each in options if each in ends or each == END]
        token = chance.choice(likely if likely and chance.random() < 0.3 else options)
        assert constraint.accept(token)
        tokens.append(token)
    return str(tokenizer.decode(tokens[:-1], skip_special_tokens=False))


@every_family
@with_specials
@pytest.mark.parametrize("required", [False, True])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), parallel=st.booleans())
def test_every_walk_is_text_or_calls_that_bind(
    tokenizers, compilers, form, has_special, required, parallel, seed
) -> None:
    shape = shape_of(has_special, required=required, parallel=parallel)
    constraint = compilers[has_special].compile(tool_calls(TOOLS, form, shape))
    text = walk(constraint, tokenizers[has_special], random.Random(seed))
    plain, calls = parsed(form, text)
    assert len(calls) <= (MAX_CALLS if parallel else 1)
    if required:
        assert plain == ""
        assert calls
    for call in calls:
        found = TOOLS.get(call.name)
        assert found is not None
        bind(found.function, found.parameters, call.arguments)


@every_family
@with_specials
def test_a_grammar_takes_what_its_family_writes(tokenizers, compilers, form, has_special) -> None:
    made, compiler = tokenizers[has_special], compilers[has_special]
    two = form.render([CALL, ToolCall("", "plan_all", {"days": 2})])
    free = tool_calls(TOOLS, form, shape_of(has_special))
    single = tool_calls(TOOLS, form, shape_of(has_special, parallel=False))
    forced = tool_calls(TOOLS, form, shape_of(has_special, required=True))
    for text in ("", "plain text, a < b", two, f"So: {two}", f"So: {form.render([CALL])}"):
        assert takes(compiler.compile(free), made, text), text
    wrong = ToolCall("", "plan", {**CALL.arguments, "unit": "feet"})
    for text in (f"{two} and", form.render([wrong]), form.render([ToolCall("", "plans", {})])):
        assert not takes(compiler.compile(free), made, text), text
    assert takes(compiler.compile(single), made, form.render([CALL]))
    assert not takes(compiler.compile(single), made, two)
    assert takes(compiler.compile(forced), made, two)
    assert not takes(compiler.compile(forced), made, "text")
    answer = compiler.compile(text_without_calls(form, shape_of(has_special)))
    assert takes(answer, made, "It is 3 km, a < b.")
    assert not takes(compiler.compile(text_without_calls(form, shape_of(has_special))), made, two)


@pytest.mark.parametrize(
    ("form", "text", "is_turn"),
    [
        (LLAMA_JSON, 'see { x } and {y}, {{"', False),
        (LLAMA_JSON, "see {x} and {{y}}{", True),
        (LLAMA_JSON, '{ "name": "plan_all", "parameters": {}}', False),
        (LLAMA_PYTHONIC, "see [1] and [[2]] [", True),
        (LLAMA_PYTHONIC, "see [other(1)]", False),
        (LLAMA_PYTHONIC, "[plan_all()]", True),
        (LLAMA_PYTHONIC, "[ plan_all()]", False),
        (MISTRAL, "see [TOOL_CALL and [x]", True),
        (MISTRAL, "see [TOOL_CALLS]x", False),
        (HERMES, "see <tool_callx>", True),
    ],
)
def test_what_is_a_turn(tokenizers, compilers, form, text, is_turn) -> None:
    constraint = compilers[False].compile(tool_calls(TOOLS, form))
    assert takes(constraint, tokenizers[False], text) == is_turn


@every_family
@pytest.mark.parametrize("thinking", ["block", "inside"])
def test_reasoning_comes_first(tokenizers, compilers, form, thinking) -> None:
    shape = shape_of(False, required=True, thinking=thinking)
    begin = "<think>" if thinking == "block" else ""
    text = f"{begin}\nThe tag is <tool_call>, [plan( {{\n</think>\n\n{form.render([CALL])}"
    constraint = compilers[False].compile(tool_calls(TOOLS, form, shape))
    assert takes(constraint, tokenizers[False], text)
    options = {"thinks": thinking == "block", "is_thinking": thinking == "inside"}
    parser = TurnParser(form, names=TOOLS.names, **options)
    reasoning, *_, call = [*parser.push(text), *parser.flush()]
    assert reasoning == ReasoningDelta("The tag is <tool_call>, [plan( {\n")
    assert isinstance(call, ToolCallArguments)


@every_family
@with_specials
def test_an_answer_may_have_a_form_of_its_own(tokenizers, compilers, form, has_special) -> None:
    answer = output_form(Literal["yes", "no"]).rule
    grammar = tool_calls(TOOLS, form, shape_of(has_special, answer=answer))
    made, compiler = tokenizers[has_special], compilers[has_special]
    assert takes(compiler.compile(grammar), made, "yes")
    assert takes(compiler.compile(grammar), made, form.render([CALL]))
    assert not takes(compiler.compile(grammar), made, "maybe")
    only = text_without_calls(form, shape_of(has_special, answer=answer))
    assert takes(compiler.compile(only), made, "no")
    assert not takes(compiler.compile(only), made, form.render([CALL]))


def tool_of(name: str, parameters: dict[str, Any]) -> Tool:
    return Tool(name=name, description=name, parameters=parameters, function=plan_all.function)


@every_family
@with_specials
def test_tools_may_have_definitions_of_their_own(tokenizers, compilers, form, has_special) -> None:
    """Two tools whose schemas, of different drafts, give one name to different things."""
    both = {"type": "object", "properties": {"a": {"$ref": "#/definitions/x"}}, "required": ["a"]}
    number, text = (
        {"definitions": {"x": {"type": "integer"}}},
        {"definitions": {"x": {"const": "q"}}},
    )
    old = {"$schema": "http://json-schema.org/draft-07/schema#"}
    tools = ToolSet([tool_of("first", old | number | both), tool_of("second", text | both)])
    grammar = tool_calls(tools, form, shape_of(has_special, required=True))
    for name, value, is_taken in [("first", 1, True), ("second", "q", True), ("second", 1, False)]:
        call = form.render([ToolCall("", name, {"a": value})])
        constraint = compilers[has_special].compile(grammar)
        assert takes(constraint, tokenizers[has_special], call) == is_taken


def test_what_ties_arguments_together_is_refused_in_the_pythonic_form() -> None:
    either = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    schema = {"type": "object", "properties": {"a": {}, "b": {}}}
    for more, keyword in [(either, "anyOf"), ({"required": ["c"]}, "required")]:
        with pytest.raises(GrammarInvalid, match=keyword):
            tool_calls(ToolSet([tool_of("f", schema | more)]), LLAMA_PYTHONIC)
    root = {"properties": {"a": {"$ref": "#"}}}
    with pytest.raises(GrammarInvalid, match=r"\$ref"):
        tool_calls(ToolSet([tool_of("f", root)]), LLAMA_PYTHONIC)
