"""`output=`: every type has a grammar, every output of it a value."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import Any, Literal

import attrs
import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentrt import grammar
from agentrt.errors import GrammarInvalid, OutputInvalid, RequestInvalid
from agentrt.grammar import GrammarCompiler
from agentrt.structured import output_form


@attrs.frozen
class Leg:
    origin: str
    seats: int = attrs.field(default=1)

    @seats.validator
    def _check(self, _: object, value: int) -> None:
        if value > 9:
            raise ValueError("at most 9 seats")


@dataclasses.dataclass
class Trip:
    legs: list[Leg]
    cabin: Literal["economy", "business"] | None = None


class Stay:
    """What pydantic's classes have, of which no more is needed."""

    def __init__(self, city: str, nights: int) -> None:
        if nights > 30:
            raise ValueError("less than or equal to 30")
        self.city, self.nights = city, nights

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stay) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        nights = {"$ref": "#/$defs/nights"}
        return {
            "$defs": {"nights": {"type": "integer", "minimum": 1}},
            "type": "object",
            "properties": {"city": {"type": "string"}, "nights": nights},
            "required": ["city", "nights"],
            "additionalProperties": False,
        }

    @classmethod
    def model_validate(cls, value: dict[str, Any]) -> Stay:
        return cls(**value)


@pytest.mark.parametrize(
    ("wanted", "text", "value"),
    [
        ({"type": "integer"}, "3", 3),
        ({"type": "object", "properties": {"a": {}}}, '{"a": [1]}', {"a": [1]}),
        (Literal["yes", "no"], "no", "no"),
        (Literal["a", 1, None, True], "1", 1),
        (Leg, '{"origin": "DEN", "seats": 2}', Leg("DEN", 2)),
        (Trip, '{"legs": [{"origin": "DEN"}]}', Trip([Leg("DEN")])),
        (list[int], "[1, 2]", [1, 2]),
        (Stay, '{"city": "Rome", "nights": 2}', Stay("Rome", 2)),
    ],
)  # fmt: skip
def test_an_output_has_a_value(wanted: Any, text: str, value: Any) -> None:
    form = output_form(wanted)
    assert form.value(text) == value
    assert type(form.value(text)) is type(value)
    if form.schema is not None:
        jsonschema.validate(json.loads(text), dict(form.schema))
    assert output_form(form) is form


@pytest.mark.parametrize(
    ("wanted", "text", "said"),
    [
        (Leg, '{"origin": "DEN", "seats": 12}', "at most 9 seats"),
        (Leg, '{"origin": "DE', "max_tokens"),
        (Stay, '{"city": "Rome", "nights": 90}', "less than or equal to 30"),
        (Literal["yes", "no"], "ye", r"\['no', 'yes'\]"),
        ({"type": "integer"}, "", "max_tokens"),
    ],
)
def test_what_is_no_value_says_why(wanted: Any, text: str, said: str) -> None:
    with pytest.raises(OutputInvalid, match=said):
        output_form(wanted).value(text)


@pytest.mark.parametrize("wanted", [3, object(), Literal["1", 1], Literal[""], dict[int, str]])
def test_a_type_without_a_form_is_refused(wanted: Any) -> None:
    with pytest.raises(RequestInvalid, match="output"):
        output_form(wanted)


def test_pydantics_own_classes() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Room(pydantic.BaseModel):
        beds: int = pydantic.Field(ge=1, le=4)

    class Hotel(pydantic.BaseModel):
        city: str
        rooms: list[Room]

    form = output_form(Hotel)
    assert form.value('{"city": "Rome", "rooms": [{"beds": 1}]}') == Hotel(
        city="Rome", rooms=[Room(beds=1)]
    )
    with pytest.raises(OutputInvalid, match="less than or equal to 4"):
        form.value('{"city": "Rome", "rooms": [{"beds": 7}]}')


# ---- random grammars: every output fits


scalars = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
        {"type": "number", "minimum": 0.5, "maximum": 8},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": "string", "format": "date"},
        {"type": ["boolean", "null"]},
        {"enum": ["a", 1, None, [True]]},
        {"const": {"x": "y"}},
    ]
)
names = st.sampled_from(["a", "bé", "c d"])


def containers(inner: Any) -> Any:
    arrays = st.builds(
        lambda items, low, more: {
            "type": "array", "items": items, "minItems": low, "maxItems": low + more,
        },
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    objects = st.builds(
        lambda properties, required: {
            "type": "object",
            "properties": properties,
            "required": sorted(set(required) & set(properties)),
            "additionalProperties": False,
        },
        st.dictionaries(names, inner, max_size=3),
        st.lists(names, max_size=2),
    )
    unions = st.builds(lambda members: {"anyOf": members}, st.lists(inner, min_size=1, max_size=3))
    return arrays | objects | unions


def random_text(compiler: GrammarCompiler, tokenizer: Any, text: str, seed: int) -> str:
    """What a model of pure chance writes under a grammar. It leans to what ends things."""
    chance, constraint, tokens = np.random.default_rng(seed), compiler.compile(text), []
    ends = [*tokenizer.eos_token_ids, *(tokenizer.encode(mark)[0] for mark in '"}],')]
    while not constraint.is_finished:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        likely = np.intersect1d(allowed, ends)
        choices = likely if len(likely) and chance.random() < 0.5 else allowed
        token = int(chance.choice(choices))
        assert constraint.accept(token)
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return str(tokenizer.decode(tokens))


@settings(max_examples=60, deadline=None)
@given(st.recursive(scalars, containers, max_leaves=5), st.integers(0, 2**32))
def test_every_output_fits_its_schema(compiler, tokenizer, schema, seed) -> None:
    form = output_form(schema)
    value = form.value(random_text(compiler, tokenizer, form.grammar, seed))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.validate(value, schema, format_checker=checker)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([r"a{1,3}\d{2}", "(x|yz){0,3}", r"[^a-z\n]{1,4}q?", r"[A-Za-z_]+@b/c"]),
    st.integers(0, 99),
)
def test_every_output_matches_its_regex(compiler, tokenizer, pattern, seed) -> None:
    text = random_text(compiler, tokenizer, grammar.regex(pattern), seed)
    assert re.fullmatch(pattern, text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5), st.integers(0, 99))
@example(["\x7f"], 0)
def test_every_output_is_one_of_the_choices(compiler, tokenizer, options, seed) -> None:
    assert random_text(compiler, tokenizer, grammar.choice(options), seed) in options


def takes(compiler: GrammarCompiler, tokenizer: Any, schema: Any, value: Any) -> bool:
    constraint = compiler.compile(output_form(schema).grammar)
    tokens = tokenizer.encode(json.dumps(value))
    return all(map(constraint.accept, tokens)) and constraint.may_end


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 9999) | st.sampled_from([1900, 2000, 2023, 2024]),
    st.integers(0, 13) | st.just(2),
    st.integers(0, 32) | st.sampled_from([28, 29, 30, 31]),
)
def test_a_date_is_one_of_the_calendar(compiler, tokenizer, year, month, day) -> None:
    try:
        is_date = bool(datetime.date(year, month, day))
    except ValueError:
        is_date = False
    text = f"{year:04}-{month:02}-{day:02}"
    assert takes(compiler, tokenizer, {"type": "string", "format": "date"}, text) == is_date
    within = {"type": "array", "items": {"anyOf": [{"type": "string", "format": "date-time"}]}}
    assert takes(compiler, tokenizer, within, [f"{text}T10:59:00.5+01:00"]) == is_date
    assert not takes(compiler, tokenizer, within, [f"{text}T10:59:60Z"])


def test_a_schema_that_cannot_be_followed_quotes_the_library(compiler) -> None:
    with pytest.raises(GrammarInvalid, match="uniqueItems"):
        compiler.compile(output_form({"type": "array", "uniqueItems": True}).grammar)
