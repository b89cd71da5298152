"""JSON schemas from the wire: references written out, and what cannot be followed."""

import pytest

from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.schemas import closed, standalone


def test_references_are_written_out_where_they_stand():
    point = {"type": "object", "properties": {"x": {"$ref": "#/definitions/n~1a"}}}
    schema = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/Point", "description": "where"}},
        "$defs": {"Point": point},
        "definitions": {"n/a": {"type": "integer"}},
    }
    assert standalone(schema, "s") == {
        "type": "object",
        "properties": {
            "p": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "description": "where",
            }
        },
    }


def test_a_name_may_be_that_of_a_keyword():
    """`required`, `items` and `$defs` as names of arguments are no keywords."""
    names = {name: {"type": "string"} for name in ("required", "items", "type", "$defs", "enum")}
    schema = {"type": "object", "properties": names, "required": list(names)}
    assert standalone(schema, "s") == schema


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(depth):
    """A few lines that would become 2^depth when written out."""
    last = {f"d{depth}": {"type": "string"}}
    pair = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**pair, **last}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (nested(80), "deep"),
        (doubling(30), "too large"),
        ({"anyOf": [{}] * 30_000}, "parts"),
        ({"$ref": "#/$defs/T", "$defs": {"T": {"items": {"$ref": "#/$defs/T"}}}}, "itself"),
        ({"$ref": "http://example.com/schema"}, "not in it"),
        ({"properties": 3}, "an object"),
        ({"type": []}, "a name"),
        ({"required": "x"}, "an array"),
        ({"minLength": -1}, "a count"),
        ({"maximum": 10**400}, "a number"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema, words):
    with pytest.raises(Refusal, match=words):
        standalone(schema, "s")


def test_a_tools_arguments_are_those_it_names_unless_its_schema_says_of_others():
    named = {"type": "object", "properties": {"a": {}}}
    assert closed(named) == {**named, "additionalProperties": False}
    for more in ({"additionalProperties": {}}, {"allOf": [{"properties": {"b": {}}}]}):
        assert closed({**named, **more}) == {**named, **more}
    assert closed({"type": "object"}) == {"type": "object"}
