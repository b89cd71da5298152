"""The grammar of an assistant's turn with tools, in the form of each family: as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from agentrt.errors import GrammarInvalid
from agentrt.grammar import bounded, exact_json_value, json_value, quoted
from agentrt.grammar_python import PythonRules
from agentrt.grammar_schemas import exact_schema
from agentrt.parsers import THINK_CLOSE, THINK_OPEN, CallFormat
from agentrt.parsers_families import (
    ARGUMENTS_TAG,
    CLOSE_TAG,
    HERMES,
    LLAMA_JSON,
    LLAMA_PYTHONIC,
    MISTRAL,
    MISTRAL_TAG,
    OPEN_TAG,
)

if TYPE_CHECKING:
    from agentrt.tools import Tool, ToolSet

MAX_CALLS = 16
_REFERENCE = '"$ref"'
Thinking = Literal["no", "block", "inside"]  # a block comes first, or the turn begins inside one

# What may come in free text that is no start of a call. Text and tag are one terminal: the lexer is
# greedy, so a text followed by a tag as two terminals would never leave the text.
_TEXT_WITHOUT_OBJECT = r'(?:[^{]|\{+[^\s"{])*\{*'
_TEXT_WITHOUT_LIST = r"(?:[^\[]|\[+[^\sA-Za-z_\[])*\[*"


@frozen(kw_only=True)
class TurnShape:
    """What one turn may be. `special` maps the texts of special tokens to their ids; `answer` is
    the rule of an answer without calls, where that is not free text."""

    required: bool = False
    parallel: bool = True
    thinking: Thinking = "no"
    answer: str | None = None
    special: Mapping[str, int] = field(factory=dict, repr=False)


ANY_SHAPE = TurnShape()


def tool_calls(tools: ToolSet, form: CallFormat = HERMES, shape: TurnShape = ANY_SHAPE) -> str:
    """The grammar of a turn that may call tools, in this family's form.

    Free text, which may end at any point; once a call begins only calls of these tools follow, one
    or, if `parallel`, several. If `required` the turn starts with a call.

    Raises GrammarInvalid without tools.
    """
    if not tools:
        raise GrammarInvalid("tool_calls needs at least one tool")
    build = {HERMES: _tagged, LLAMA_JSON: _llama_json, LLAMA_PYTHONIC: _pythonic, MISTRAL: _mistral}
    return build.get(form, _mistral_named)(tools, shape)


def text_without_calls(form: CallFormat = HERMES, shape: TurnShape = ANY_SHAPE) -> str:
    """The grammar of a turn that answers without a call, where tools could be called otherwise.

    In text, such an answer does not begin with `<`: SmolLM2-135M, kept from `<tool_call>` alone,
    began 12 answers of 12 with a call in a form of its own, such as `<tool_call_2>`.
    """
    if shape.answer is not None:
        return _turn("answer", f"answer: {shape.answer}\n", shape)
    text = {LLAMA_JSON: _TEXT_WITHOUT_OBJECT, LLAMA_PYTHONIC: _TEXT_WITHOUT_LIST}.get(
        form, text_without(OPEN_TAG if form is HERMES else MISTRAL_TAG)
    )
    first = {LLAMA_JSON: r"{", LLAMA_PYTHONIC: r"\["}.get(form, r"<\[")
    return _turn("TEXT", f"TEXT: /[^{first}\\s]{text}/\n", shape)


def thinking_then(rule: str, thinking: Thinking, special: Mapping[str, int]) -> str:
    """The grammar of a model's reasoning, then of this rule."""
    return _turn("answer", f"answer: {rule}\n", TurnShape(thinking=thinking, special=special))


# ---- families: each gives what the tag is, what follows it, and the text without it


def _tagged(tools: ToolSet, shape: TurnShape) -> str:
    body = {"anyOf": [_call_schema(each) for each in tools]}
    open_, close = _literal(OPEN_TAG, shape), _literal(CLOSE_TAG, shape)
    more = _repeated(f'"\\n" {open_} "\\n" call', shape)
    rules = f'calls: call {more}\ncall: body "\\n" {close}\nbody: {exact_json_value(body)}\n'
    if OPEN_TAG in shape.special:
        return _after_special(OPEN_TAG, '"\\n" calls', rules, shape)
    return _after_text(f"{OPEN_TAG}\n", text_without(OPEN_TAG), rules, shape)


def _llama_json(tools: ToolSet, shape: TurnShape) -> str:
    tag = '{"name": '
    heads = [quoted(f'"{each.name}", "parameters": ') for each in tools]
    calls = " | ".join(f'{head} arguments_{index} "}}"' for index, head in enumerate(heads))
    more = _repeated(f"{quoted('; ' + tag)} call", shape)
    rules = f"{_argument_rules(tools)}calls: call {more}\ncall: {calls}\n"
    return _after_text(tag, _TEXT_WITHOUT_OBJECT, rules, shape)


def _mistral(tools: ToolSet, shape: TurnShape) -> str:
    body = {"anyOf": [_call_schema(each) for each in tools]}
    more = _repeated('", " body', shape)
    rules = f'calls: body {more} "]"\nbody: {exact_json_value(body)}\n'
    if MISTRAL_TAG in shape.special:
        return _after_special(MISTRAL_TAG, '" [" calls', rules, shape)
    return _after_text(f"{MISTRAL_TAG} [", text_without(MISTRAL_TAG), rules, shape)


def _mistral_named(tools: ToolSet, shape: TurnShape) -> str:
    tag, arguments = _literal(MISTRAL_TAG, shape), _literal(ARGUMENTS_TAG, shape)
    rules = _argument_rules(tools)
    call = " | ".join(
        f"{quoted(each.name)} {arguments} arguments_{index}" for index, each in enumerate(tools)
    )
    more = _repeated(f"{tag} call", shape)
    rules += f"calls: call {more}\ncall: {call}\n"
    if MISTRAL_TAG in shape.special:
        return _after_special(MISTRAL_TAG, "calls", rules, shape)
    return _after_text(MISTRAL_TAG, text_without(MISTRAL_TAG), rules, shape)


def _pythonic(tools: ToolSet, shape: TurnShape) -> str:
    """Here the tag has the tool's name in it: a bracket alone may well be text."""
    python = PythonRules()
    arguments = [python.arguments(bounded(each.parameters)) for each in tools]
    rules, starts = "", []
    for index, (each, rule) in enumerate(zip(tools, arguments, strict=True)):
        rules += f'after_{index}: {rule} ")" more "]"\n'
        if not shape.required and shape.answer is None:
            tag = f"{_TEXT_WITHOUT_LIST}\\[{re.escape(each.name)}\\("
            rules += f"TEXT_AND_TAG_{index}: /{tag}/\n"
            starts.append(f"TEXT_AND_TAG_{index} after_{index}")
        else:
            starts.append(f"{quoted('[' + each.name + '(')} after_{index}")
    call = " | ".join(
        f'{quoted(each.name + "(")} {rule} ")"' for each, rule in zip(tools, arguments, strict=True)
    )
    more = _repeated('", " call', shape) or '""'
    rules += f"call: {call}\nmore: {more}\n{python.text}"
    if not shape.required:
        starts.append("TEXT" if shape.answer is None else "answer")
        rules += f"TEXT: /{_TEXT_WITHOUT_LIST}/\n" if shape.answer is None else ""
    if shape.answer is not None and not shape.required:
        rules += f"answer: {shape.answer}\n"
    return _turn(" | ".join(starts), rules, shape)


# ---- what they share


def _after_text(tag: str, text: str, rules: str, shape: TurnShape) -> str:
    """A turn whose calls begin with a tag in plain characters."""
    if shape.required:
        return _turn(f"{quoted(tag)} calls", rules, shape)
    if shape.answer is not None:
        return _turn(f"answer | {quoted(tag)} calls", f"{rules}answer: {shape.answer}\n", shape)
    escaped = re.escape(tag).replace("\\\n", "\\n").replace("\\ ", " ")
    terminals = f"TEXT: /{text}/\nTEXT_AND_TAG: /{text}{escaped}/\n"
    return _turn("TEXT | TEXT_AND_TAG calls", rules + terminals, shape)


def _after_special(tag: str, calls: str, rules: str, shape: TurnShape) -> str:
    """A turn whose calls begin with a special token, which no text can hold."""
    called = f"{_literal(tag, shape)} {calls}"
    if shape.required:
        return _turn(called, rules, shape)
    if shape.answer is not None:
        return _turn(f"answer | {called}", f"{rules}answer: {shape.answer}\n", shape)
    return _turn(f"TEXT | TEXT? {called}", f"{rules}TEXT: /(?s:.*)/\n", shape)


def _turn(start: str, rules: str, shape: TurnShape) -> str:
    """The grammar, with the model's reasoning first."""
    if shape.thinking == "no":
        return f"start: {start}\n{rules}"
    begin = f"{_literal(THINK_OPEN, shape)} " if shape.thinking == "block" else ""
    if THINK_CLOSE in shape.special:
        thought = f"THOUGHT? {_literal(THINK_CLOSE, shape)} SPACE"
        terminals = "THOUGHT: /(?s:.*)/\n"
    else:
        escaped = re.escape(THINK_CLOSE).replace("/", r"\/")
        thought, terminals = "THOUGHT SPACE", f"THOUGHT: /{text_without(THINK_CLOSE)}{escaped}/\n"
    terminals += "SPACE: /\\n{0,2}/\n"
    return f"start: {begin}{thought} turn\nturn: {start}\n{rules}{terminals}"


def _repeated(rule: str, shape: TurnShape) -> str:
    return f"({rule}){{0,{MAX_CALLS - 1}}}" if shape.parallel else ""


def _argument_rules(tools: ToolSet) -> str:
    """A rule for each tool's arguments as JSON: arguments_0, and so on."""
    return "".join(
        f"arguments_{index}: {json_value(bounded(each.parameters))}\n"
        for index, each in enumerate(tools)
    )


def _literal(text: str, shape: TurnShape) -> str:
    """A text of the family: a special token where the tokenizer has it as one."""
    return f"<[{shape.special[text]}]>" if text in shape.special else quoted(text)


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = exact_schema(bounded(tool.parameters))
    if _REFERENCE in json.dumps(arguments):
        # a resource of its own: in it "#/$defs/..." is what the tool's schema calls so
        arguments.setdefault("$id", f"http://tool/{tool.name}")
    properties = {"name": {"const": tool.name}, "arguments": arguments}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def text_without(tag: str) -> str:
    """A regex of all texts that do not hold the tag, whose first character occurs in it only once.

    Written out as the automaton that it is: with llguidance's `~` operator the slices do not apply,
    and the first mask of a turn takes ten times as long.
    """
    first, *rest = (re.escape(character).replace("/", r"\/") for character in tag)
    begun = ""  # a start of the tag, after its first character
    broken = f"[^{rest[-1]}{first}]"  # ... and then a character that is not the tag's next
    for character in reversed(rest[:-1]):
        begun = f"(?:{character}{begun})?"
        broken = f"(?:[^{character}{first}]|{character}{broken})"
    starts = f"(?:{first}{begun})*"
    return f"(?:[^{first}]|{starts}{first}{broken})*{starts}"
