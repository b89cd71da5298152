"""What llguidance alone would let through, and `jsonschema` does not."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.errors import GrammarInvalid
from agentrt.grammar import GrammarCompiler, bounded, json_schema

N = {"definitions": {"n": {"type": "integer"}}, "$ref": "#/definitions/n"}
INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
DRAFT_4 = {"$schema": "http://json-schema.org/draft-04/schema#"}
DRAFT_2019 = {"$schema": "https://json-schema.org/draft/2019-09/schema"}


def takes(compiler: GrammarCompiler, tokenizer: Any, schema: Any, text: str) -> bool:
    constraint = compiler.compile(json_schema(schema))
    return all(map(constraint.accept, tokenizer.encode(text))) and constraint.may_end


MERGED = {
    "type": "object",
    "allOf": [{"properties": {"x": INTEGER}}, {"properties": {"y": TEXT}, "required": ["y"]}],
}
EITHER = {
    "type": "object",
    "properties": {"x": INTEGER, "y": TEXT},
    "anyOf": [{"required": ["x"]}, {"required": ["y"]}],
}
LATE = {"type": "object", "properties": {"x": INTEGER, "y": TEXT}, "allOf": [{"required": ["y"]}]}


@pytest.mark.parametrize(
    ("schema", "text", "is_taken"),
    [
        # a declared key that is written with an escape
        ({"properties": {"x": INTEGER}}, r'{"\u0078": "q"}', False),
        ({"properties": {"x": INTEGER}}, '{"x": "q"}', False),
        ({"properties": {"x": INTEGER}}, '{"x": 1, "y": "q", "": [], "xx": 2}', True),
        ({"properties": {"x": INTEGER}, "additionalProperties": TEXT}, '{"y": "q"}', True),
        ({"properties": {"x": INTEGER}, "additionalProperties": TEXT}, '{"y": 1}', False),
        ({"properties": {"x": INTEGER}, "additionalProperties": TEXT}, r'{"\u0078": "q"}', False),
        ({"properties": {'f"': INTEGER}}, r'{"f\"": "q"}', False),
        ({"properties": {'f"': INTEGER}}, r'{"f\"": 1}', True),
        ({"type": "object", "required": ["x"]}, '{"x": "q", "y": 2}', True),
        ({"type": "object", "required": ["x"]}, '{"y": 2}', False),
        # objects that must fit two schemas
        (MERGED, '{"y": "q"}', True),
        (MERGED, '{"x": 1, "y": "q"}', True),
        (MERGED, '{"y": "q", "z": 1}', True),
        (MERGED, '{"x": "q", "y": "q"}', False),
        (MERGED, '{"y": 1}', False),
        (LATE, '{"x": 1, "y": "q", "z": 1}', True),
        (MERGED, r'{"y": "q", "\u0078": "q"}', False),
        (EITHER, '{"x": 1}', True),
        (EITHER, '{"y": "q", "z": 1}', True),
        (EITHER, '{"z": 1}', False),
        # patterns of keys
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, '{"x": 1, "xy": 2}', True),
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, r'{"\u0078": "q"}', False),
        ({"type": "object", "patternProperties": {r"^\w$": INTEGER}}, '{"x": 1}', True),
        ({"type": "object", "patternProperties": {r"^\w$": INTEGER}}, '{"é": "q"}', False),
        ({"properties": {"xa": {}}, "patternProperties": {"^x": INTEGER}}, '{"xa": "q"}', False),
        # older drafts
        ({**DRAFT_7, "type": "array", "items": [INTEGER]}, '[1, "q"]', True),
        ({**DRAFT_7, "items": [INTEGER], "additionalItems": TEXT}, "[1, 2]", False),
        ({**DRAFT_7, "type": "array", "items": [], "additionalItems": TEXT}, "[1]", False),
        ({**DRAFT_7, "items": INTEGER, "additionalItems": TEXT}, "[1, 2]", True),
        ({**DRAFT_7, **N, "minimum": 9}, "1", True),
        ({**DRAFT_2019, "$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 9}, "1", False),
        ({**DRAFT_7, "definitions": {"n": {"$id": "#n", **INTEGER}}, "$ref": "#n"}, '"q"', False),
        ({**DRAFT_4, "id": "http://a/b", **N}, "1", True),
        ({**DRAFT_4, "type": "integer", "minimum": 3, "exclusiveMinimum": True}, "3", False),
        # a pattern and a format
        ({"type": "string", "format": "date", "pattern": "^2023"}, '"2023-02-30"', False),
        ({"type": "string", "format": "date", "pattern": "^2023"}, '"2023-02-28"', True),
        # what a float holds
        ({"multipleOf": 1.5}, "7.5", True),
        ({"multipleOf": 1.5}, "9007199254740994.5", False),
        ({"type": "integer", "multipleOf": 2.0}, "90071992547409938", True),
        ({"type": "string", "format": "password", "maxLength": 2.0}, '"ab"', True),
        ({"type": "string", "format": "password", "maxLength": 2.0}, '"abc"', False),
    ],
)  # fmt: skip
def test_what_is_taken(compiler, tokenizer, schema: Any, text: str, is_taken: bool) -> None:
    assert takes(compiler, tokenizer, schema, text) == is_taken
    validator = jsonschema.validators.validator_for(schema)(schema)
    if is_taken:
        assert validator.is_valid(json.loads(text))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text('ab"\\é\n', max_size=3), min_size=1, max_size=4, unique=True),
    st.text('ab"\\é\nz', max_size=4),
    st.booleans(),
)
def test_a_key_is_another_one_just_where_it_is(
    compiler, tokenizer, names: list[str], key: str, is_escaped: bool
) -> None:
    """A key that no property has may have any value; one of a property, however it is written, has
    the property's."""
    schema = {"type": "object", "properties": dict.fromkeys(names, INTEGER)}
    written = json.dumps(key, ensure_ascii=is_escaped)
    text = f'{{{written}: "q"}}'
    is_taken = takes(compiler, tokenizer, schema, text)
    assert is_taken <= (key not in names)
    if key not in names and not (is_escaped and "é" in key):
        assert is_taken


def test_bounds_make_no_choice_of_one_that_is_none(compiler) -> None:
    """{"a": 1} fits both; were the second closed, it would seem to fit the first alone."""
    both = [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": TEXT}}]
    with pytest.raises(GrammarInvalid, match="oneOf"):
        compiler.compile(json_schema(bounded({"oneOf": [{"type": "object", **x} for x in both]})))


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        (
            {"oneOf": [{"required": ["k"]}, {"patternProperties": {"^x": TEXT}}]},
            "patternProperties",
        ),
        ({"patternProperties": {"^x": {}}, "additionalProperties": TEXT}, "additionalProperties"),
        ({"patternProperties": {r"^\w": {}}, "properties": {"é": TEXT}}, "patternProperties"),
        ({**DRAFT_2019, "items": {"$recursiveRef": "#"}}, "recursiveRef"),
    ],
)
def test_what_cannot_be_held_is_refused_by_its_keyword(schema: Any, keyword: str) -> None:
    with pytest.raises(GrammarInvalid, match=keyword):
        json_schema(schema)
