from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, NewType, NotRequired, TypedDict

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt.docstring import parse_docstring
from agentrt.errors import RequestInvalid, ToolInvalid
from agentrt.tool_arguments import bind, validate
from agentrt.tool_schema import describe, schema_of


class Cabin(Enum):
    ECONOMY = "economy"
    BUSINESS = "business"


class Leg(TypedDict):
    origin: Annotated[str, "IATA code"]
    seat: NotRequired[int]


@dataclasses.dataclass
class Passenger:
    name: str
    bags: int = 0
    legs: list[Leg] = dataclasses.field(default_factory=list)


@attrs.frozen
class Payment:
    _amount: float = attrs.field(validator=attrs.validators.gt(0))
    cabin: Cabin = Cabin.ECONOMY


UserId = NewType("UserId", str)


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (UserId, {"type": "string"}),
        (None, {"type": "null"}),
        (Any, {}),
        (int | None, {"type": ["integer", "null"]}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a", 1], {"enum": ["a", 1]}),
        (Cabin, {"type": "string", "enum": ["economy", "business"]}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (list, {"type": "array", "items": {}}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (set[str], {"type": "array", "items": {"type": "string"}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (
            tuple[int, str],
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "items": False,
                "minItems": 2,
                "maxItems": 2,
            },
        ),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Mapping, {"type": "object", "additionalProperties": {}}),
        (
            list[int] | str,
            {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
        ),
        (Annotated[bool, "really?"], {"type": "boolean", "description": "really?"}),
        (
            Leg,
            {
                "type": "object",
                "properties": {
                    "origin": {"type": "string", "description": "IATA code"},
                    "seat": {"type": "integer"},
                },
                "required": ["origin"],
                "additionalProperties": False,
            },
        ),
        (
            Payment,
            {
                "type": "object",
                "properties": {
                    "amount": {"type": "number"},
                    "cabin": {
                        "type": "string",
                        "enum": ["economy", "business"],
                        "default": "economy",
                    },
                },
                "required": ["amount"],
                "additionalProperties": False,
            },
        ),
    ],
)
def test_a_hint_has_this_schema(hint: Any, schema: dict[str, Any]) -> None:
    assert schema_of(hint, "x") == schema


def test_a_dataclass_nests_and_requires_only_what_has_no_default() -> None:
    schema = schema_of(Passenger, "x")
    assert schema["required"] == ["name"]
    assert schema["properties"]["bags"] == {"type": "integer", "default": 0}
    assert schema["properties"]["legs"]["items"]["required"] == ["origin"]


def search(city: str, days: Annotated[int, "from the hint"] = 3, *, cabin: Cabin = Cabin.ECONOMY):
    """Searches flights.

    Only direct ones.

    Args:
        city (str): Where to go,
            by name.
        days: From the docstring.

    Returns:
        A list.
    """


def test_signature_and_docstring_make_the_schema() -> None:
    description, schema = describe(search)
    assert description == "Searches flights.\n\nOnly direct ones."
    assert schema == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where to go, by name."},
            "days": {"type": "integer", "description": "from the hint", "default": 3},
            "cabin": {"type": "string", "enum": ["economy", "business"], "default": "economy"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }


def test_a_partial_has_no_bound_parameters() -> None:
    assert list(describe(partial(search, "Oslo"))[1]["properties"]) == ["days", "cabin"]


NUMPY = """Adds.

Parameters
----------
a, b : int
    The numbers
    to add.
c : str, optional
    A label.

Returns
-------
int
    The sum.
"""
REST = """Adds.

:param a: The numbers
    to add.
:param int b: The numbers to add.
:type a: int
:param c: A label.
:returns: The sum.
"""
GOOGLE = """Adds.

Arguments:
    a: The numbers to add.
    b (int): The numbers
        to add.

    c: A label.
Raises:
    ValueError: c: never.
"""


@pytest.mark.parametrize("text", [NUMPY, REST, GOOGLE])
def test_docstring_styles_agree(text: str) -> None:
    documented = {"a": "The numbers to add.", "b": "The numbers to add.", "c": "A label."}
    assert parse_docstring(text) == ("Adds.", documented)


@given(st.text(alphabet="ab :-\n()Args", max_size=60))
def test_any_docstring_parses(text: str) -> None:
    parse_docstring(text)


def bare(a):  # type: ignore[no-untyped-def]
    """No annotation."""


def starred(*rest: int) -> None:
    """Star."""


def double_starred(**rest: int) -> None:
    """Two stars."""


def positional(a: int, /) -> None:
    """Positional-only."""


def odd(when: complex) -> None:
    """No JSON form."""


def keyed(table: dict[int, str]) -> None:
    """Keys."""


def unresolved(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Not importable."""


@dataclasses.dataclass
class Tree:
    children: list[Tree]


def recursive(tree: Tree) -> None:
    """Recursive."""


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (bare, "parameter 'a' of bare: has no annotation"),
        (starred, "'rest' of starred"),
        (double_starred, "'rest' of double_starred"),
        (positional, "'a' of positional.*positional-only"),
        (odd, "'when' of odd.*complex"),
        (keyed, "'table' of keyed.*int"),
        (unresolved, "Missing"),
        (recursive, "'tree' of recursive.*contains itself"),
    ],
)
def test_what_has_no_schema_is_refused_by_name(function: Any, match: str) -> None:
    with pytest.raises(ToolInvalid, match=match):
        describe(function)


def book(
    who: Passenger,
    payment: Payment,
    cabins: frozenset[Cabin],
    limit: float,
    pair: tuple[int, float],
    extra: dict[str, Leg | None],
    either: int | Cabin = 1,
) -> None:
    """Books."""


BOOKING: dict[str, Any] = {
    "who": {"name": "Ada", "legs": [{"origin": "OSL"}]},
    "payment": {"amount": 10},
    "cabins": ["economy", "economy"],
    "limit": 3,
    "pair": [1.0, 2],
    "extra": {"a": None, "b": {"origin": "BGO", "seat": 3}},
    "either": "business",
}


def test_bind_makes_the_values_that_the_hints_name() -> None:
    bound = bind(book, describe(book)[1], BOOKING)
    assert bound == {
        "who": Passenger("Ada", 0, [{"origin": "OSL"}]),
        "payment": Payment(10.0),
        "cabins": frozenset({Cabin.ECONOMY}),
        "limit": 3.0,
        "pair": (1, 2.0),
        "extra": {"a": None, "b": {"origin": "BGO", "seat": 3}},
        "either": Cabin.BUSINESS,
    }
    assert [type(item) for item in bound["pair"]] == [int, float]
    assert type(bound["limit"]) is float


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"who": {"name": 3}}, r"arguments\.who\.name: expected string, got 3"),
        ({"who": {}}, r"arguments\.who: missing name"),
        ({"payment": {"amount": -1}}, r"arguments\.payment: .*> 0"),
        ({"cabins": ["first"]}, r"arguments\.cabins\[0\]: expected one of 'economy', 'business'"),
        ({"limit": True}, r"arguments\.limit: expected number, got True"),
        ({"limit": float("nan")}, r"arguments\.limit: expected number"),
        ({"pair": [1]}, r"arguments\.pair: expected 2 to 2 items, got 1"),
        ({"pair": [1.5, 2]}, r"arguments\.pair\[0\]: expected integer, got 1\.5"),
        ({"extra": {"a": 1}}, r"arguments\.extra\.a: expected"),
        ({"colour": "red"}, r"arguments: unknown colour; known: who, payment"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestInvalid, match=match):
        bind(book, describe(book)[1], BOOKING | change)


@pytest.mark.parametrize(
    ("schema", "value", "is_valid"),
    [
        ({"const": 1}, True, False),
        ({"enum": [1, None]}, None, True),
        ({"type": "integer"}, 2**70, True),
        ({"type": "object"}, {"a": 1}, True),
        ({"type": "array", "items": False}, [1], False),
        ({"type": "object", "additionalProperties": {"type": "null"}}, {"a": 1}, False),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, 1, False),
        ({"type": "string", "pattern": "^a"}, "b", True),  # left to the tool
    ],
)
def test_validate(schema: dict[str, Any], value: Any, is_valid: bool) -> None:
    if is_valid:
        assert validate(schema, value) == value
    else:
        with pytest.raises(RequestInvalid, match="arguments"):
            validate(schema, value)
