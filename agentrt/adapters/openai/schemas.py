"""JSON schemas from the wire: checked as far as we read them ourselves, and made to stand alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from attrs import define, frozen

from agentrt.adapters.openai.fields import MOST_DEPTH, wrong_type
from agentrt.adapters.openai.refusal import Refusal

MOST_PARTS = 20_000  # objects and lists of one schema, once its references are written out
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_LISTS = (*_SCHEMA_LISTS, "enum", "required", "examples")
_DATA = ("enum", "const", "default", "examples")  # what they hold is no schema
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_DEFINITIONS = ("$defs", "definitions")
# Where one of these stands beside `properties`, there may be other properties.
_OTHERS = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref"),
    *("allOf", "anyOf", "oneOf", "if", "dependentSchemas"),
}
Kind = Literal["schema", "names", "data"]


def checked(schema: Any, path: str) -> dict[str, Any]:
    """The schema, if the keywords that we read have values of their type. What else it says is
    checked when it is compiled."""
    if not isinstance(schema, dict):
        raise wrong_type(path, "an object", schema)
    for part in _parts(schema, path):
        if part.depth > MOST_DEPTH:
            raise Refusal(
                f"{path} is nested more than {MOST_DEPTH} deep", path, "invalid_json_schema"
            )
        if part.kind == "schema" and isinstance(part.value, dict):
            _check_keywords(part.value, part.path)
    return schema


def standalone(schema: Any, path: str) -> dict[str, Any]:
    """The same, with each reference replaced by what it refers to.

    A tool's schema becomes part of a larger one, in which its references would lead elsewhere; and
    a model that reads the tool sees at once what an argument is.
    """
    return _Inliner(checked(schema, path), path).inlined()


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, without any but those that it names, since a model that may
    invent arguments does. One that says itself what else there may be stays as it is."""
    if schema.get("properties") and not schema.keys() & _OTHERS:
        return {**schema, "additionalProperties": False}
    return dict(schema)


@frozen
class _Part:
    """An object or list of a schema. In a map of names to schemas, a keyword is only a name."""

    value: Any
    path: str
    depth: int
    kind: Kind


def _kind(parent: Kind, key: Any) -> Kind:
    """What stands behind this key or index of a part."""
    if parent != "schema":
        return "schema" if parent == "names" else parent
    if key in _DATA:
        return "data"
    return "names" if key in _SCHEMA_MAPS else "schema"


def _parts(schema: Any, path: str) -> Iterator[_Part]:
    """All objects and lists in it. Not recursive: it may be nested too deep."""
    waiting = [_Part(schema, path, 0, "schema")]
    for _ in range(MOST_PARTS):
        if not waiting:
            return
        part = waiting.pop()
        yield part
        is_object = isinstance(part.value, dict)
        inner = part.value.items() if is_object else enumerate(part.value)
        waiting += [
            _Part(
                value,
                f"{part.path}.{key}",
                part.depth + 1,
                _kind(part.kind, key) if is_object else part.kind,
            )
            for key, value in inner
            if isinstance(value, dict | list)
        ]
    raise Refusal(f"{path} has more than {MOST_PARTS} parts", path, "invalid_json_schema")


def _check_keywords(part: dict[str, Any], path: str) -> None:
    for names, is_right, wanted in _RULES:
        for name in names:
            if name in part and not is_right(part[name]):
                raise wrong_type(f"{path}.{name}", wanted, part[name])


def _is_kind(value: Any) -> bool:
    """One name of a type, or a list of some."""
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) for name in names)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_SCHEMA_MAPS, lambda value: isinstance(value, dict), "an object"),
    (_LISTS, lambda value: isinstance(value, list), "an array"),
    (("type",), _is_kind, "a name of a type or some"),
    (("items", "additionalProperties"), lambda value: isinstance(value, bool | dict), "a schema"),
    (_COUNTS, _is_count, "a count below 2^31"),
    (_BOUNDS, _is_bound, "a number below 1e300"),
    (("$ref",), lambda value: isinstance(value, str), "a string"),
)


@define
class _Inliner:
    """Writes one schema's references out."""

    root: dict[str, Any]
    path: str
    num_parts: int = 0

    def inlined(self) -> dict[str, Any]:
        made = self._inline(self.root, (), "schema")
        assert isinstance(made, dict)
        return made

    def _inline(self, part: Any, parents: tuple[str, ...], kind: Kind) -> Any:
        if not isinstance(part, dict | list) or kind == "data":
            return part
        self.num_parts += 1
        if self.num_parts > MOST_PARTS:
            raise self._refused("is too large once its references are written out")
        if isinstance(part, list):
            return [self._inline(item, parents, kind) for item in part]
        made = {
            key: self._inline(value, parents, _kind(kind, key))
            for key, value in part.items()
            if kind != "schema" or key not in ("$ref", *_DEFINITIONS)
        }
        if kind != "schema" or "$ref" not in part:
            return made
        name = part["$ref"]
        if name in parents or len(parents) >= MOST_DEPTH:
            raise self._refused(f"refers to itself by {name!r}, which a tool's schema cannot")
        found = self._inline(self._target(name), (*parents, name), "schema")
        return {**found, **made} if isinstance(found, dict) else found

    def _target(self, name: str) -> Any:
        target: Any = self.root
        steps = name.split("/")
        for step in steps[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, dict) else None
        if steps[0] != "#" or not isinstance(target, dict | bool):
            raise self._refused(f"refers to {name!r}, which is not in it")
        return target

    def _refused(self, why: str) -> Refusal:
        return Refusal(f"{self.path} {why}", self.path, "invalid_json_schema")
