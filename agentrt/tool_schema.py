"""JSON schemas from Python signatures."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, Required, Union

import attrs

from agentrt.docstring import parse_docstring
from agentrt.errors import ToolInvalid

Schema = dict[str, Any]

SCALAR_NAMES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    None: "null",
    type(None): "null",
}
_ANYTHING = (Any, object)
LIST_TYPES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
SET_TYPES = (set, frozenset, collections.abc.Set)
MAPPING_TYPES = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_SUPPORTED = (
    "str, int, float, bool, None, Literal, Enum, list, tuple, set, dict with str keys, "
    "TypedDict, dataclass, attrs class, Any, and unions of these"
)


@attrs.frozen
class _Field:
    """One field of a TypedDict, dataclass or attrs class."""

    name: str
    hint: Any
    is_required: bool
    default: Any


def describe(function: Callable[..., Any]) -> tuple[str, Schema]:
    """The description and the JSON schema of a function's arguments.

    The description is the docstring up to its first section; Google, numpy and reST sections give
    the parameters' descriptions, and `Annotated[T, "text"]` wins over them.

    Raises ToolInvalid, naming the parameter, where no schema can be made.
    """
    description, documented = parse_docstring(_docstring(function))
    hints = function_hints(function)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for parameter in _parameters(function):
        where = f"parameter {parameter.name!r} of {name_of(function)}"
        _check_kind(parameter, where)
        schema = schema_of(hints[parameter.name], where)
        if parameter.name in documented:
            schema.setdefault("description", documented[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema.update(_default_entry(parameter.default))
        properties[parameter.name] = schema
    return description, _object_schema(properties, required)


def schema_of(hint: Any, where: str) -> Schema:
    """The JSON schema of one type hint; `where` names it in errors.

    Raises ToolInvalid if the hint has no JSON form.
    """
    return _schema(hint, where, ())


def name_of(function: Callable[..., Any]) -> str:
    """A callable's name, for errors and as the default name of a tool."""
    function = _innermost(function)
    return str(getattr(function, "__name__", type(function).__name__))


def is_unbound_method(function: Callable[..., Any]) -> bool:
    """Whether this is a function from a class body that has no instance yet."""
    parent = getattr(function, "__qualname__", "").rpartition(".")[0]
    if not inspect.isfunction(function) or not parent or parent.endswith("<locals>"):
        return False
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and first.name == "self" and first.annotation is first.empty


def function_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's resolved type hints, `Annotated` kept.

    Raises ToolInvalid if an annotation cannot be resolved.
    """
    target = _innermost(function)
    target = target if inspect.isroutine(target) else type(target).__call__
    return _resolved_hints(target, name_of(function))


def _resolved_hints(target: Any, where: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError) as exc:
        raise ToolInvalid(
            f"{where}: an annotation cannot be resolved ({exc}); define the type at module level"
        ) from exc


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _docstring(function: Callable[..., Any]) -> str:
    target = _innermost(function)
    return inspect.getdoc(target if inspect.isroutine(target) else type(target).__call__) or ""


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    return parameters[1:] if is_unbound_method(function) else parameters


def _check_kind(parameter: inspect.Parameter, where: str) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ToolInvalid(f"{where}: * and ** parameters have no schema; name each parameter")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ToolInvalid(f"{where}: arguments come by name, so it cannot be positional-only")
    if parameter.annotation is parameter.empty:
        raise ToolInvalid(f"{where}: has no annotation; write {parameter.name}: str, or its type")


def _schema(hint: Any, where: str, parents: tuple[Any, ...]) -> Schema:
    if typing.get_origin(hint) is Annotated:
        base, *notes = typing.get_args(hint)
        text = next((note for note in notes if isinstance(note, str)), None)
        schema = _schema(base, where, parents)
        return schema if text is None else {**schema, "description": text}
    if hint in _ANYTHING:
        return {}
    if hint in SCALAR_NAMES:
        return {"type": SCALAR_NAMES[hint]}
    if isinstance(hint, typing.NewType):
        return _schema(hint.__supertype__, where, parents)
    if is_union(hint):
        return _union_schema([_schema(arm, where, parents) for arm in typing.get_args(hint)])
    values = _choices(hint)
    if values is not None:
        return _choice_schema(values, where)
    return _container_schema(hint, where, parents)


def _container_schema(hint: Any, where: str, parents: tuple[Any, ...]) -> Schema:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        members = [_schema(argument, where, parents) for argument in arguments]
        size = {"minItems": len(members), "maxItems": len(members)}
        return {"type": "array", "prefixItems": members, "items": False, **size}
    if origin in LIST_TYPES or origin in SET_TYPES or origin is tuple:
        return {"type": "array", "items": _schema((*arguments, Any)[0], where, parents)}
    if origin in MAPPING_TYPES:
        key, value = arguments or (str, Any)
        if key is not str:
            raise ToolInvalid(f"{where}: the keys of a JSON object are str, not {key!r}")
        return {"type": "object", "additionalProperties": _schema(value, where, parents)}
    return _record_schema(hint, where, parents)


def _record_schema(hint: Any, where: str, parents: tuple[Any, ...]) -> Schema:
    fields = record_fields(hint, where)
    if fields is None:
        raise ToolInvalid(f"{where}: {hint!r} has no JSON form; use {_SUPPORTED}")
    if hint in parents:
        raise ToolInvalid(f"{where}: {hint.__name__} contains itself, which is not supported")
    properties = {
        field.name: _schema(field.hint, f"{where}, field {field.name!r}", (*parents, hint))
        | _default_entry(field.default)
        for field in fields
    }
    return _object_schema(properties, [field.name for field in fields if field.is_required])


def _object_schema(properties: dict[str, Schema], required: list[str]) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return {**schema, "additionalProperties": False}


def _union_schema(members: list[Schema]) -> Schema:
    # {"type": ["string", "null"]} costs a prompt half the tokens of the anyOf form
    if all(set(member) == {"type"} for member in members):
        return {"type": [member["type"] for member in members]}
    return {"anyOf": members}


def _choice_schema(values: list[Any], where: str) -> Schema:
    if not values or any(type(value) not in SCALAR_NAMES for value in values):
        raise ToolInvalid(f"{where}: choices must be str, int, float, bool or None, got {values}")
    kinds = {SCALAR_NAMES[type(value)] for value in values}
    return {"type": kinds.pop(), "enum": values} if len(kinds) == 1 else {"enum": values}


def _default_entry(default: Any) -> Schema:
    """The schema's "default", where there is one that JSON can hold and that says something."""
    value = default.value if isinstance(default, Enum) else default
    if value is None or value is inspect.Parameter.empty:
        return {}
    try:
        return {"default": json.loads(json.dumps(value, allow_nan=False))}
    except (TypeError, ValueError):
        return {}  # the function still applies it; only the model does not see it


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _choices(hint: Any) -> list[Any] | None:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return None


def record_fields(hint: Any, where: str) -> list[_Field] | None:
    """The fields of a TypedDict, dataclass or attrs class; None for any other type."""
    if typing.is_typeddict(hint):
        return list(_typed_dict_fields(hint, where))
    if not isinstance(hint, type):
        return None
    if attrs.has(hint):
        return list(_attrs_fields(hint, where))
    if dataclasses.is_dataclass(hint):
        return list(_dataclass_fields(hint, where))
    return None


def _typed_dict_fields(hint: Any, where: str) -> Iterator[_Field]:
    for name, inner in _resolved_hints(hint, where).items():
        is_required = name in hint.__required_keys__
        # with postponed annotations __required_keys__ does not see these wrappers
        while typing.get_origin(inner) in (Required, NotRequired):
            is_required = typing.get_origin(inner) is Required
            inner = typing.get_args(inner)[0]
        yield _Field(name, inner, is_required, None)


def _dataclass_fields(hint: Any, where: str) -> Iterator[_Field]:
    hints = _resolved_hints(hint, where)
    for field in dataclasses.fields(hint):
        if field.init:
            absent = field.default is dataclasses.MISSING
            is_required = absent and field.default_factory is dataclasses.MISSING
            yield _Field(
                field.name, hints[field.name], is_required, None if absent else field.default
            )


def _attrs_fields(hint: Any, where: str) -> Iterator[_Field]:
    hints = _resolved_hints(hint, where)
    for field in attrs.fields(hint):
        if field.init and field.name not in hints:
            raise ToolInvalid(f"{where}: field {field.name!r} of {hint.__name__} has no annotation")
        if field.init:
            is_required = field.default is attrs.NOTHING
            is_factory = isinstance(field.default, attrs.Factory)  # type: ignore[arg-type]
            default = None if is_required or is_factory else field.default
            yield _Field(field.alias or field.name, hints[field.name], is_required, default)
