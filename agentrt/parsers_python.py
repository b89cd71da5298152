"""Arguments of a call in Python's syntax, as Llama's pythonic format has them.

Not `ast`: that warns of escapes which a model may well write, and takes more than values.
"""

from __future__ import annotations

import json
import re
from typing import Any

from attrs import define

_CONSTANTS = {"True": True, "False": False, "None": None}
_CONSTANTS |= {"true": True, "false": False, "null": None}  # models mix the two up
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<text>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<mark>[()\[\]{},:=]))",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_ESCAPES |= {"/": "/", "\\": "\\", "'": "'", '"': '"'}
MAX_DEPTH = 64


def python_arguments(text: str) -> dict[str, Any] | None:
    """`a=1, b=["x"]` as a dict; None where it is something else."""
    reader = _Reader(text)
    try:
        arguments = reader.arguments()
        json.dumps(arguments, ensure_ascii=False).encode()
    except ValueError:  # also a lone surrogate, which fits no tokenizer
        return None
    return arguments


def python_literal(value: Any) -> str:
    """A JSON value as Python writes it, its texts in JSON's form, which Python reads alike."""
    if isinstance(value, dict):
        items = (f"{_quote(key)}: {python_literal(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    if isinstance(value, str):
        return _quote(value)
    return repr(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@define
class _Reader:
    """Reads values from `at` on. Raises ValueError at what is none."""

    text: str
    at: int = 0

    def arguments(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while self.text[self.at :].strip():
            if made:
                self.take("mark", ",")
                if not self.text[self.at :].strip():
                    break
            name = self.take("name")
            self.take("mark", "=")
            if name in made:
                raise ValueError(f"{name} is given twice")
            made[name] = self.value(0)
        return made

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        kind, token = self.next()
        if kind == "text":
            return self.joined(_unescaped(token[1:-1]))
        if kind == "number":
            return float(token) if re.search(r"[.eE]", token) else int(token)
        if kind == "name" and token in _CONSTANTS:
            return _CONSTANTS[token]
        if token in ("[", "("):
            return self.items("]" if token == "[" else ")", depth)
        if token == "{":
            return self.pairs(depth)
        raise ValueError(f"{token!r} is no value")

    def joined(self, text: str) -> str:
        """A text, with those that follow it: Python joins them."""
        while (match := _TOKEN.match(self.text, self.at)) and match["text"] is not None:
            self.at = match.end()
            text += _unescaped(match["text"][1:-1])
        return text

    def items(self, close: str, depth: int) -> list[Any]:
        made: list[Any] = []
        while not self.reads(close):
            if made:
                self.take("mark", ",")
                if self.reads(close):
                    break
            made.append(self.value(depth + 1))
        return made

    def pairs(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while not self.reads("}"):
            if made:
                self.take("mark", ",")
                if self.reads("}"):
                    break
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text")
            self.take("mark", ":")
            made[key] = self.value(depth + 1)
        return made

    def next(self) -> tuple[str, str]:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise ValueError(f"nothing readable at {self.at}")
        self.at = match.end()
        kind = str(match.lastgroup)
        return kind, match[kind]

    def take(self, kind: str, wanted: str | None = None) -> str:
        found, token = self.next()
        if found != kind or (wanted is not None and token != wanted):
            raise ValueError(f"expected {wanted or kind}, got {token!r}")
        return token

    def reads(self, mark: str) -> bool:
        match = _TOKEN.match(self.text, self.at)
        if match is None or match["mark"] != mark:
            return False
        self.at = match.end()
        return True


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    plain = _ESCAPE.sub(_character, text)
    # JSON writes a character beyond U+FFFF as two escapes.
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _character(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else match[0]
    return _ESCAPES.get(code, match[0])
