"""Structured output: what `output=` takes, the grammar that holds a model to it, and its value."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import field, frozen

from agentrt.errors import OutputInvalid, RequestInvalid, ToolInvalid
from agentrt.grammar import bounded, choice, json_schema, json_value
from agentrt.tool_arguments import convert, validate
from agentrt.tool_schema import schema_of
from agentrt.types import GenerateOptions

_WHERE = "output"


@frozen(kw_only=True)
class OutputForm:
    """One kind of answer. `rule` is its body as the right side of a rule of a grammar; `grammar`
    is the whole grammar of an answer that is nothing else."""

    rule: str
    grammar: str
    schema: Mapping[str, Any] | None  # of the JSON value; None where the answer is bare text
    _read: Callable[[str], Any] = field(repr=False)

    def value(self, text: str) -> Any:
        """The value of a whole answer.

        Raises OutputInvalid where it is none: it was cut off, or a class refused its arguments.
        """
        try:
            return self._read(text)
        except OutputInvalid:
            raise
        except Exception as exc:  # a class may refuse what its schema lets through
            raise OutputInvalid(
                f"the output cannot be read: {exc}: raise max_tokens if it was cut off, or let "
                f"the schema say what the class wants. The output is {text[:200]!r}"
            ) from exc


def refuse_two_grammars(options: GenerateOptions, output: object | None) -> None:
    """Raise RequestInvalid where an output form and a grammar would both hold one generation."""
    if output is not None and options.grammar is not None:
        raise RequestInvalid("output and options.grammar exclude each other: give one of them")


def output_form(wanted: Any) -> OutputForm:
    """The form of a JSON schema (a dict), a Literal, an attrs class, dataclass or TypedDict, a
    class with pydantic's methods, or another type that a tool's parameter may have.

    A dict is taken as it is. Texts, lists and numbers of a class that sets no bounds get ours: a
    small model repeats itself without end wherever a grammar lets it.

    Raises RequestInvalid where a type has no JSON form, and GrammarInvalid where a schema asks what
    no grammar holds; whether llguidance can follow it is known when it is compiled.
    """
    if isinstance(wanted, OutputForm):
        return wanted
    if isinstance(wanted, Mapping):
        return _json_form(wanted, lambda value: value)
    if typing.get_origin(wanted) is Literal:
        return _choice_form(typing.get_args(wanted))
    if callable(getattr(wanted, "model_json_schema", None)):
        return _json_form(bounded(wanted.model_json_schema()), wanted.model_validate)
    try:
        schema = schema_of(wanted, _WHERE)
    except ToolInvalid as exc:
        raise RequestInvalid(str(exc)) from exc
    return _json_form(
        bounded(schema), lambda value: convert(wanted, validate(schema, value, _WHERE), _WHERE)
    )


def _json_form(schema: Mapping[str, Any], make: Callable[[Any], Any]) -> OutputForm:
    return OutputForm(
        rule=json_value(schema),
        grammar=json_schema(schema),
        schema=schema,
        read=lambda text: make(json.loads(text)),
    )


def _choice_form(values: tuple[Any, ...]) -> OutputForm:
    """A Literal: its texts as they are, other values as JSON writes them."""
    by_text = {value if isinstance(value, str) else json.dumps(value): value for value in values}
    if len(by_text) < len(values) or "" in by_text:
        raise RequestInvalid(f"output: the texts of {values} must be different, and none empty")

    def read(text: str) -> Any:
        if text not in by_text:
            raise OutputInvalid(
                f"the output is {text[:200]!r}, not one of {sorted(by_text)}: raise max_tokens"
            )
        return by_text[text]

    rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in by_text)
    return OutputForm(rule=rule, grammar=choice(list(by_text)), schema=None, read=read)
