"""Grammars of values in Python's syntax, from JSON schemas: for calls in Llama's pythonic form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field

from agentrt.errors import GrammarInvalid, RequestInvalid
from agentrt.grammar import json_value, quoted
from agentrt.parsers_python import python_literal
from agentrt.tool_arguments import validate

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
)
_DEFINITIONS = ("$schema", "$defs", "definitions")
_OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties"))
# The keywords that are followed in Python's syntax; a schema that has others is in JSON's.
_OF_ARRAYS = (
    frozenset(("type", "items", "minItems", "maxItems")),
    frozenset(("type", "items", "minItems", "maxItems", "prefixItems")),
)
# of arguments, which are as few as the schema lets them be
_NO_MATTER = frozenset((*_DEFINITIONS, "$id", "$comment", "patternProperties", "maxProperties"))


@define
class PythonRules:
    """Collects the rules of a Lark grammar. A schema beyond what `agentrt.tool_schema` writes is
    followed in JSON's syntax, which differs in `true`, `false` and `null` alone."""

    _rules: list[str] = field(factory=list, init=False)
    _definitions: dict[str, Any] = field(factory=dict, init=False)

    @property
    def text(self) -> str:
        """All rules so far."""
        return "".join(self._rules)

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """A rule for `name=value, ...`, in the order of the schema's properties.

        Raises GrammarInvalid where a keyword ties arguments to each other.
        """
        properties = schema.get("properties", {})
        unknown = set(schema) - _OF_OBJECTS - _ANNOTATIONS - _NO_MATTER
        if schema.get("maxProperties", len(properties)) < len(properties):
            unknown.add("maxProperties")
        if not set(schema.get("required", ())) <= set(properties):
            unknown.add("required")
        if unknown:
            raise GrammarInvalid(
                f"{', '.join(sorted(unknown))} of a tool's arguments cannot be followed in the "
                "pythonic form: say it of single properties, and declare those that are required"
            )
        self._definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
        return self._listed(schema, "{name}=")

    def value(self, schema: Any) -> str:
        """A rule for one value."""
        if not isinstance(schema, Mapping):
            return self._in_json({} if schema is not False else {"anyOf": []})
        keys = set(schema) - _ANNOTATIONS
        if keys in ({"const"}, {"enum"}, {"type", "enum"}, {"type", "const"}):
            choices = [schema["const"]] if "const" in keys else schema["enum"]
            fitting = [each for each in choices if _fits(each, schema)]
            return self._add(" | ".join(quoted(python_literal(each)) for each in fitting))
        if keys == {"anyOf"}:
            return self._add(" | ".join(self.value(each) for each in schema["anyOf"]))
        kind = schema.get("type")
        if isinstance(kind, list) and not {"const", "enum", "anyOf"} & keys:
            return self._add(" | ".join(self.value({**schema, "type": each}) for each in kind))
        return self._typed(kind, schema, keys)

    def _typed(self, kind: str | None, schema: Mapping[str, Any], keys: set[str]) -> str:
        if kind == "boolean" and keys == {"type"}:
            return self._add('"True" | "False"')
        if kind == "null" and keys == {"type"}:
            return self._add('"None"')
        if kind == "array" and "prefixItems" in keys and keys <= _OF_ARRAYS[1]:
            members = [self.value(each) for each in schema["prefixItems"]]
            if schema.get("minItems") == len(members) == schema.get("maxItems"):
                inside = ' ", " '.join(members)
                return self._add(f'"[" {inside} "]"')
        elif kind == "array" and isinstance(schema.get("items"), Mapping) and keys <= _OF_ARRAYS[0]:
            return self._array(schema)
        elif kind == "object" and schema.get("properties") and _is_plain_object(schema, keys):
            inside = self._listed(schema, "{key}: ")
            return self._add(f'"{{" {inside} "}}"')
        return self._in_json({key: value for key, value in schema.items() if key != "default"})

    def _in_json(self, schema: Mapping[str, Any]) -> str:
        """A rule in JSON's syntax, with the definitions that it may refer to."""
        for reference in _references(schema):
            if not str(reference).startswith(("#/$defs/", "#/definitions/")):
                raise GrammarInvalid(
                    f"$ref {reference!r} of a tool's arguments cannot be followed in the pythonic "
                    "form: it must point into $defs"
                )
            schema = {**self._definitions, **schema}
        return self._add(json_value(schema))

    def _array(self, schema: Mapping[str, Any]) -> str:
        low, high = schema.get("minItems", 0), schema["maxItems"]
        if high < 1:
            return self._add('"[]"')
        item = self.value(schema["items"])
        whole = f'"[" {item} (", " {item}){{{max(0, low - 1)},{high - 1}}} "]"'
        return self._add(whole if low else f'"[]" | {whole}')

    def _listed(self, schema: Mapping[str, Any], head: str) -> str:
        """Named values with commas between them, those that are not required maybe left out.

        `rest` is what may follow once one was written, `first` what may while none was.
        """
        required: Sequence[str] = schema.get("required", ())
        rest = first = self._add('""')
        for name, inner in reversed(schema.get("properties", {}).items()):
            start = head.replace("{name}", name).replace("{key}", json.dumps(name))
            one = f"{quoted(start)} {self.value(inner)} {rest}"
            if name in required:
                first, rest = self._add(one), self._add(f'", " {one}')
            else:
                first, rest = self._add(f"{one} | {first}"), self._add(f'", " {one} | {rest}')
        return first

    def _add(self, right: str) -> str:
        name = f"value_{len(self._rules)}"
        self._rules.append(f"{name}: {right}\n")
        return name


def _is_plain_object(schema: Mapping[str, Any], keys: set[str]) -> bool:
    return keys <= _OF_OBJECTS and set(schema.get("required", ())) <= set(schema["properties"])


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    try:
        validate(schema, value)
    except RequestInvalid:
        return False
    return True


def _references(schema: Any) -> Iterator[Any]:
    if isinstance(schema, Mapping):
        yield from [schema["$ref"]] if "$ref" in schema else []
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from _references(inner)
