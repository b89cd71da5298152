"""The JSON arguments of a call: checked against the tool's schema, then made Python values."""

from __future__ import annotations

import math
import textwrap
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, NotRequired, Required

from agentrt.errors import RequestInvalid
from agentrt.tool_schema import (
    MAPPING_TYPES,
    SCALAR_NAMES,
    SET_TYPES,
    function_hints,
    is_union,
    record_fields,
    schema_of,
)


def bind(function: Callable[..., Any], schema: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """Validates JSON arguments and converts them to what the function's hints ask for.

    Raises RequestInvalid, naming the path, where an argument does not fit.
    """
    valid = validate(schema, arguments)
    hints = function_hints(function)
    return {
        name: convert(hints[name], value, f"arguments.{name}") if name in hints else value
        for name, value in valid.items()
    }


def validate(schema: Any, value: Any, path: str = "arguments") -> Any:
    """Checks a JSON value against a schema and returns it, whole floats made int where asked.

    Covers the keywords that `schema_of` writes. Others (`pattern`, `format`, `$ref`, ... of a
    schema from elsewhere) are left to the tool.

    Raises RequestInvalid, naming the path, where the value does not fit.
    """
    if schema is False:
        raise RequestInvalid(f"{path}: not allowed here")
    if not isinstance(schema, Mapping):
        return value
    if "anyOf" in schema:
        value = _validate_any(schema["anyOf"], value, path)
    if "const" in schema or "enum" in schema:
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        if not any(_same(choice, value) for choice in choices):
            listed = ", ".join(map(_short, choices))
            raise RequestInvalid(f"{path}: expected one of {listed}, got {_short(value)}")
    if "type" in schema:
        value = _validate_type(schema["type"], value, path)
    if isinstance(value, list):
        return _validate_items(schema, value, path)
    return _validate_properties(schema, value, path) if isinstance(value, dict) else value


def _validate_any(members: list[Any], value: Any, path: str) -> Any:
    errors = []
    for member in members:
        try:
            return validate(member, value, path)
        except RequestInvalid as error:
            errors.append(str(error))
    raise RequestInvalid(" or ".join(dict.fromkeys(errors)))


def _validate_type(expected: str | list[str], value: Any, path: str) -> Any:
    names = [expected] if isinstance(expected, str) else expected
    actual = _type_name(value)
    if actual in names or (actual == "integer" and "number" in names):
        return value
    if actual == "number" and "integer" in names and value.is_integer():
        return int(value)
    raise RequestInvalid(f"{path}: expected {' or '.join(names)}, got {_short(value)}")


def _validate_items(schema: Mapping[str, Any], value: list[Any], path: str) -> list[Any]:
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not low <= len(value) <= high:
        raise RequestInvalid(f"{path}: expected {low} to {high} items, got {len(value)}")
    first = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    return [
        validate(first[index] if index < len(first) else rest, item, f"{path}[{index}]")
        for index, item in enumerate(value)
    ]


def _validate_properties(
    schema: Mapping[str, Any], value: dict[str, Any], path: str
) -> dict[str, Any]:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        raise RequestInvalid(f"{path}: missing {', '.join(missing)}")
    unknown = [name for name in value if name not in properties]
    if unknown and others is False and "patternProperties" not in schema:
        known = ", ".join(properties) or "none"
        raise RequestInvalid(f"{path}: unknown {', '.join(unknown)}; known: {known}")
    return {
        name: validate(properties.get(name, others), item, f"{path}.{name}")
        for name, item in value.items()
    }


def _type_name(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    names = {dict: "object", list: "array", **SCALAR_NAMES}
    return names.get(type(value), type(value).__name__)


def _same(choice: Any, value: Any) -> bool:
    return isinstance(choice, bool) == isinstance(value, bool) and bool(choice == value)


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), width=80, placeholder=" ...")


def convert(hint: Any, value: Any, path: str) -> Any:
    """A valid JSON value as the Python value that the hint names."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Annotated, Required, NotRequired):
        return convert(arguments[0], value, path)
    if isinstance(hint, typing.NewType):
        return convert(hint.__supertype__, value, path)
    if is_union(hint):
        return _convert_union(arguments, value, path)
    if hint is float:
        return float(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(value, list):
        return _convert_items(origin, arguments, value, path)
    return _convert_object(hint, origin, arguments, value, path)


def _convert_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    for member in members:
        try:
            valid = validate(schema_of(member, path), value, path)
        except RequestInvalid:
            continue
        return convert(member, valid, path)
    raise RequestInvalid(f"{path}: {_short(value)} fits no member of the union")


def _convert_items(origin: Any, arguments: tuple[Any, ...], value: list[Any], path: str) -> Any:
    is_fixed = origin is tuple and bool(arguments) and arguments[-1] is not Ellipsis
    hints = arguments if is_fixed else [(*arguments, Any)[0]] * len(value)
    items = [
        convert(hint, item, f"{path}[{index}]")
        for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    ]
    if origin in (tuple, frozenset):
        return origin(items)
    return set(items) if origin in SET_TYPES else items


def _convert_object(
    hint: Any, origin: Any, arguments: tuple[Any, ...], value: Any, path: str
) -> Any:
    if not isinstance(value, dict):
        return value
    if origin in MAPPING_TYPES:
        item_hint = arguments[1] if arguments else Any
        return {key: convert(item_hint, item, f"{path}.{key}") for key, item in value.items()}
    fields = record_fields(hint, path)
    if fields is None:
        return value
    hints = {field.name: field.hint for field in fields}
    made = {name: convert(hints[name], item, f"{path}.{name}") for name, item in value.items()}
    try:
        return hint(**made)
    except Exception as exc:  # a validator of the class refused the model's value
        raise RequestInvalid(f"{path}: {exc}") from exc
