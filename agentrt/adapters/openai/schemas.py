"""JSON schemas from the wire: checked as far as we read them ourselves, and made to stand alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from attrs import define

from agentrt.adapters.openai.fields import MOST_DEPTH, wrong_type, wrong_value
from agentrt.adapters.openai.refusal import Refusal

MOST_PARTS = 20_000  # objects and lists of one schema, once its references are written out
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_LISTS = (*_SCHEMA_LISTS, "enum", "required", "examples")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_DEFINITIONS = ("$defs", "definitions")


def checked(schema: Any, path: str) -> dict[str, Any]:
    """The schema, if the keywords that we read have values of their type. What else it says is
    checked when it is compiled."""
    if not isinstance(schema, dict):
        raise wrong_type(path, "an object", schema)
    for depth, where, part in _parts(schema, path):
        if depth > MOST_DEPTH:
            raise Refusal(
                f"{path} is nested more than {MOST_DEPTH} deep", path, "invalid_json_schema"
            )
        if isinstance(part, dict):
            _check_keywords(part, where)
    return schema


def standalone(schema: Any, path: str) -> dict[str, Any]:
    """The same, with each reference replaced by what it refers to.

    A tool's schema becomes part of a larger one, in which its references would lead elsewhere; and
    a model that reads the tool sees at once what an argument is.
    """
    return _Inliner(checked(schema, path), path).inlined()


def _parts(schema: Any, path: str) -> Iterator[tuple[int, str, Any]]:
    """All objects and lists in it, with their depth. Not recursive: it may be nested too deep."""
    waiting: list[tuple[int, str, Any]] = [(0, path, schema)]
    for _ in range(MOST_PARTS):
        if not waiting:
            return
        depth, where, part = waiting.pop()
        yield depth, where, part
        inner = part.items() if isinstance(part, dict) else enumerate(part)
        waiting += [
            (depth + 1, f"{where}.{key}", value)
            for key, value in inner
            if isinstance(value, dict | list)
        ]
    raise Refusal(f"{path} has more than {MOST_PARTS} parts", path, "invalid_json_schema")


def _check_keywords(part: dict[str, Any], path: str) -> None:
    """An object may also be a map of names, where a keyword is only a name: then its value is a
    schema, and an object."""
    for names, is_right, wanted in _RULES:
        for name in names:
            value = part.get(name)
            if name in part and not isinstance(value, dict) and not is_right(value):
                raise wrong_type(f"{path}.{name}", wanted, value)
    kinds = part.get("type")
    if isinstance(kinds, list) and not (kinds and all(isinstance(kind, str) for kind in kinds)):
        raise wrong_value(f"{path}.type", "a list of names of types", str(kinds))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_SCHEMA_MAPS, lambda value: False, "an object"),
    (_LISTS, lambda value: isinstance(value, list), "an array"),
    (("type",), lambda value: isinstance(value, str | list), "a string or an array"),
    (("items", "additionalProperties"), lambda value: isinstance(value, bool), "a schema"),
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
        made = self._inline(self.root, ())
        assert isinstance(made, dict)
        return {key: value for key, value in made.items() if key not in _DEFINITIONS}

    def _inline(self, part: Any, parents: tuple[str, ...]) -> Any:
        if not isinstance(part, dict | list):
            return part
        self.num_parts += 1
        if self.num_parts > MOST_PARTS:
            raise self._refused("is too large once its references are written out")
        if isinstance(part, list):
            return [self._inline(item, parents) for item in part]
        name = part.get("$ref")
        if not isinstance(name, str):
            return {key: self._inline(value, parents) for key, value in part.items()
                    if key not in _DEFINITIONS or not isinstance(value, dict)}  # fmt: skip
        if name in parents or len(parents) >= MOST_DEPTH:
            raise self._refused(f"refers to itself by {name!r}, which a tool's schema cannot")
        beside = {key: value for key, value in part.items() if key != "$ref"}
        found = self._inline(self._target(name), (*parents, name))
        return {**found, **self._inline(beside, parents)} if isinstance(found, dict) else found

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
