"""Tables of what a JSON object may hold, and their reading. Unknown names are refused.

A reader takes a value and its path, and returns what is kept of it or raises Refusal. `null` stands
for an absent field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from attrs import frozen

from agentrt.adapters.openai.refusal import Refusal, unsupported

Reader = Callable[[Any, str], Any]
MOST_DEPTH = 64  # of objects and lists in one another; what comes after us works recursively


@frozen
class Required:
    """A field that must be there."""

    read: Reader


Table = Mapping[str, Reader | Required]
_NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number"}
_NAMES |= {list: "an array", dict: "an object", type(None): "null"}


def read_json(body: bytes) -> Any:
    """The value of a whole body. Raises Refusal where it is none that UTF-8 can say."""
    try:
        value = json.loads(body, parse_constant=no_constant)
        if b"\\u" in body:  # an escape may be half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise Refusal(f"the body is not valid JSON: {exc}", code="invalid_json") from exc
    return value


def no_constant(name: str) -> NoReturn:
    """For NaN and its like, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def read_object(value: Any, path: str, table: Table) -> dict[str, Any]:
    """The object's fields as the table reads them; those that are absent or null are left out."""
    if not isinstance(value, dict):
        raise wrong_type(path or "the body", "an object", value)
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in table:
            known = ", ".join(table)
            raise Refusal(
                f"unknown parameter {prefix + name!r}: known are {known}",
                prefix + name,
                "unknown_parameter",
            )
    for name, reader in table.items():
        if isinstance(reader, Required) and name not in value:
            where = f"{prefix}{name}"
            raise Refusal(f"{where} is missing", where, "missing_required_parameter")
    return {
        name: (reader.read if isinstance(reader, Required) else reader)(value[name], prefix + name)
        for name, reader in table.items()
        if isinstance(reader, Required) or value.get(name) is not None
    }


def wrong_type(path: str, wanted: str, value: Any) -> Refusal:
    """For a value of another JSON type than it must have."""
    got = _NAMES.get(type(value), "something else")
    return Refusal(f"{path} must be {wanted}, got {got}", path, "invalid_type")


def wrong_value(path: str, wanted: str, value: Any) -> Refusal:
    """For a value of the right type that cannot be used."""
    shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, int) else str_of(value)
    shown = shown if len(shown) <= 80 else shown[:80] + " ..."
    return Refusal(f"{path} must be {wanted}, got {shown}", path, "invalid_value")


def str_of(number: int) -> str:
    """A whole number, short: Python refuses to print very long ones."""
    return str(number) if -(10**30) < number < 10**30 else "a number of over 30 digits"


# ---- readers of plain values


def text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(path, "a string", value)
    return value


def short_text(most_characters: int, least_characters: int = 0) -> Reader:
    def read(value: Any, path: str) -> str:
        if not least_characters <= len(text(value, path)) <= most_characters:
            wanted = f"a string of {least_characters} to {most_characters} characters"
            raise wrong_value(path, wanted, value)
        return str(value)

    return read


def flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(path, "a boolean", value)
    return value


def whole(low: int, high: int) -> Reader:
    def read(value: Any, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(path, "an integer", value)
        if not low <= value <= high:
            raise wrong_value(path, f"an integer in [{low}, {high}]", value)
        return value

    return read


def number(low: float, high: float) -> Reader:
    def read(value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(path, "a number", value)
        if not low <= value <= high:
            raise wrong_value(path, f"a number in [{low:g}, {high:g}]", value)
        return float(value)

    return read


def one_of(*choices: str) -> Reader:
    def read(value: Any, path: str) -> str:
        if text(value, path) not in choices:
            raise wrong_value(path, f"one of {', '.join(map(repr, choices))}", value)
        return str(value)

    return read


# ---- readers of larger ones


def nested(table: Table) -> Reader:
    """An object with these fields."""
    return lambda value, path: read_object(value, path, table)


def listed(read_item: Reader, most: int, least: int = 0) -> Reader:
    def read(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(path, "an array", value)
        if not least <= len(value) <= most:
            raise Refusal(
                f"{path} must have {least} to {most} items, got {len(value)}", path, "invalid_value"
            )
        return [read_item(item, f"{path}[{index}]") for index, item in enumerate(value)]

    return read


def mapped(read_item: Reader, most: int) -> Reader:
    """An object with names of the caller's own."""

    def read(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        if len(value) > most:
            raise Refusal(
                f"{path} must have {most} entries at most, got {len(value)}", path, "invalid_value"
            )
        return {name: read_item(item, f"{path}.{name}") for name, item in value.items()}

    return read


def by_tag(tag: str, tables: Mapping[str, Table]) -> Reader:
    """An object whose field `tag` names the table that it follows."""

    def read(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        where = f"{path}.{tag}"
        if tag not in value:
            raise Refusal(f"{where} is missing", where, "missing_required_parameter")
        kind = one_of(*tables)(value[tag], where)
        return read_object(value, path, {tag: text, **tables[kind]})

    return read


def only(why: str, *accepted: Any) -> Reader:
    """A field of OpenAI's API where nothing but these values can be served."""

    def read(value: Any, path: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in accepted):
            raise unsupported(path, why)
        return value

    return read


METADATA = mapped(short_text(512), 16)
NOTHING: Table = MappingProxyType({})
