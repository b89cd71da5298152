"""What both of OpenAI's forms say in the same way: sampling, tools and their choice, formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from attrs import frozen

from agentrt.adapters.openai import fields
from agentrt.adapters.openai.fields import Required, Table
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.schemas import checked, standalone
from agentrt.grammar import json_value
from agentrt.tools import Tool, ToolSet
from agentrt.types import GenerateOptions

MOST_TOOLS = 128
MOST_TOKENS = 1 << 24
MOST_SEED = (1 << 63) - 1
_LONE_MODEL = "it asks for another model or service than this one"
NAME = fields.short_text(64, 1)


def _whole_name(value: Any, path: str) -> str:
    name = str(NAME(value, path))
    if not all(
        character.isascii() and (character.isalnum() or character in "_-") for character in name
    ):
        raise fields.wrong_value(path, "letters, digits, _ and - alone", name)
    return name


FUNCTION: Table = {
    "name": Required(_whole_name),
    "description": fields.text,
    "parameters": standalone,
    "strict": fields.flag,  # calls fit their schema in any case
}
# Fields of both forms that need no more than their type, and those that a local model cannot serve
# but in one way.
SHARED: Table = {
    "model": Required(fields.text),
    "metadata": fields.METADATA,
    "moderation": fields.only("guards of the engine do that"),
    "parallel_tool_calls": fields.flag,
    "prompt_cache_key": fields.short_text(1024, 1),
    "prompt_cache_options": fields.only("the cache's budgets are the engine's"),
    "prompt_cache_retention": fields.only("how long KV stays is the engine's", "in_memory"),
    "safety_identifier": fields.text,  # a label of the caller's, for nobody here
    "service_tier": fields.only(_LONE_MODEL, "auto", "default"),
    "stream": fields.flag,
    "temperature": fields.number(0, 2),
    "top_logprobs": fields.whole(0, 20),
    "top_p": fields.number(0, 1),
    "user": fields.short_text(1024),
}


@frozen(kw_only=True)
class Choice:
    """Which tools may be called, and whether one must be; a `single` one is called once."""

    allowed: frozenset[str] | None  # None: all
    required: bool = False
    single: bool = False


ANY_TOOL, SOME_TOOL = Choice(allowed=None), Choice(allowed=None, required=True)
CHOICES: Mapping[str, Choice] = {
    "none": Choice(allowed=frozenset()),
    "auto": ANY_TOOL,
    "required": SOME_TOOL,
}


def allowed_choice(mode: str, names: Sequence[str]) -> Choice:
    return Choice(allowed=frozenset(names), required=mode == "required")


def named_choice(name: str) -> Choice:
    return Choice(allowed=frozenset([name]), required=True, single=True)


def tool_of(function: Mapping[str, Any]) -> Tool:
    """A tool that the caller runs."""
    return Tool(
        name=function["name"],
        description=function.get("description", ""),
        parameters=function.get("parameters", {"type": "object", "properties": {}}),
        function=_run_by_caller,
    )


def _run_by_caller(**_: Any) -> NoReturn:
    raise AssertionError("calls of tools from the wire are run by the caller")


def chosen_tools(tools: ToolSet, choice: Choice, path: str) -> ToolSet:
    """The tools that may be called. Raises Refusal where the choice needs another one."""
    if choice.allowed is None:
        if choice.required and not tools:
            raise Refusal(f"{path} asks for a call, but there are no tools", path, "invalid_value")
        return tools
    unknown = sorted(choice.allowed - set(tools.names))
    if unknown:
        known = ", ".join(tools.names) or "none"
        raise Refusal(f"{path} names {unknown[0]!r}; the tools are: {known}", path, "invalid_value")
    return ToolSet([tool for tool in tools if tool.name in choice.allowed])


def json_answer(schema: Any, path: str) -> str:
    """The grammar's rule of an answer that fits the schema."""
    return json_value(checked(schema, path))


def generate_options(body: Mapping[str, Any], *, logprobs: bool) -> GenerateOptions:
    """How to sample. What the body leaves out is as OpenAI's API has it: temperature 1."""
    if "top_p" in body and body["top_p"] == 0:
        body = {**body, "top_p": 1.0, "temperature": 0.0}  # of the best token alone
    stop = body.get("stop", ())
    # Sample i of n uses seed + i.
    seed = body["seed"] % (MOST_SEED - 256) if "seed" in body else None
    return GenerateOptions(
        temperature=body.get("temperature", 1.0),
        top_p=body.get("top_p", 1.0),
        presence_penalty=body.get("presence_penalty", 0.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        logit_bias=body.get("logit_bias", {}),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=seed,
        top_logprobs=body.get("top_logprobs", 0) if logprobs else None,
        n=body.get("n", 1),
    )
