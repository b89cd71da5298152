"""Grammars of values in Python's syntax, from JSON schemas: for calls in Llama's pythonic form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field

from agentrt.grammar import json_value, quoted
from agentrt.parsers_python import python_literal


@define
class PythonRules:
    """Collects the rules of a Lark grammar. A schema beyond what `agentrt.tool_schema` writes is
    followed in JSON's syntax, which differs in `true`, `false` and `null` alone."""

    _rules: list[str] = field(factory=list, init=False)

    @property
    def text(self) -> str:
        """All rules so far."""
        return "".join(self._rules)

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """A rule for `name=value, ...`, in the order of the schema's properties."""
        return self._listed(schema, "{name}=")

    def value(self, schema: Any) -> str:
        """A rule for one value."""
        if not isinstance(schema, Mapping):
            return self._add(json_value({}))
        if "const" in schema or "enum" in schema:
            choices = [schema["const"]] if "const" in schema else schema["enum"]
            return self._add(" | ".join(quoted(python_literal(each)) for each in choices))
        if "anyOf" in schema:
            return self._add(" | ".join(self.value(each) for each in schema["anyOf"]))
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._add(" | ".join(self.value({**schema, "type": each}) for each in kind))
        return self._typed(kind, schema)

    def _typed(self, kind: str | None, schema: Mapping[str, Any]) -> str:
        if kind == "boolean":
            return self._add('"True" | "False"')
        if kind == "null":
            return self._add('"None"')
        if kind == "array" and "prefixItems" in schema:
            members = [self.value(each) for each in schema["prefixItems"]]
            if schema.get("minItems") == len(members) == schema.get("maxItems"):
                inside = ' ", " '.join(members)
                return self._add(f'"[" {inside} "]"')
        elif kind == "array" and isinstance(schema.get("items"), Mapping):
            return self._array(schema)
        elif kind == "object" and schema.get("properties"):
            inside = self._listed(schema, "{key}: ")
            return self._add(f'"{{" {inside} "}}"')
        known = {key: value for key, value in schema.items() if key != "default"}
        return self._add(json_value(known))

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
