"""`output=`: every type has a grammar, every output of it a value."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import attrs
import jsonschema
import pydantic
import pytest

from agentrt.errors import OutputInvalid, RequestInvalid
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


class Stay(pydantic.BaseModel):
    city: str
    nights: int = pydantic.Field(ge=1, le=30)
    rooms: list[Room] = []


class Room(pydantic.BaseModel):
    beds: int


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
        (Stay, '{"city": "Rome", "nights": 2, "rooms": [{"beds": 1}]}',
         Stay(city="Rome", nights=2, rooms=[Room(beds=1)])),
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
