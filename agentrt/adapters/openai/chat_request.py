"""A Chat Completions body, checked field by field, as what the engine is asked for."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from agentrt.adapters.openai import fields, settings
from agentrt.adapters.openai.fields import Required, Table
from agentrt.adapters.openai.messages import read_messages
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.settings import CHOICES, FUNCTION, Choice
from agentrt.adapters.openai.wanted import Wanted
from agentrt.tools import ToolSet

_TEXT_ONLY = "the model writes text"
_NO_REASONING = "how much the model thinks is its own"


def _read_choice(value: Any, path: str) -> Choice:
    if isinstance(value, str):
        return CHOICES[fields.one_of(*CHOICES)(value, path)]
    row = fields.by_tag("type", _CHOICES)(value, path)
    if row["type"] == "function":
        return settings.named_choice(row["function"]["name"])
    allowed = row["allowed_tools"]
    names = [each["function"]["name"] for each in allowed["tools"]]
    return settings.allowed_choice(allowed["mode"], names)


def _read_format(value: Any, path: str) -> str | None:
    """The rule of the answer; None where it is free text."""
    row = fields.by_tag("type", _FORMATS)(value, path)
    if row["type"] == "text":
        return None
    schema = row["json_schema"].get("schema") if row["type"] == "json_schema" else None
    return settings.json_answer(
        {"type": "object"} if schema is None else schema, f"{path}.json_schema.schema"
    )


def _read_stop(value: Any, path: str) -> str | list[str]:
    one = fields.short_text(256, 1)
    if isinstance(value, str):
        return str(one(value, path))
    stops: list[str] = fields.listed(one, 4)(value, path)
    return stops


def _read_bias(value: Any, path: str) -> dict[int, float]:
    made = fields.mapped(fields.number(-100, 100), 1024)(value, path)
    wrong = next((key for key in made if not (key.isascii() and key.isdecimal())), None)
    if wrong is not None or any(len(key) > 9 for key in made):
        raise Refusal(f"{path} maps token ids to numbers, got {wrong or 'a long id'!r}", path)
    return {int(key): bias for key, bias in made.items()}


_NAMED: Table = {"name": Required(settings.NAME)}
_NAMED_FUNCTION: Table = {"function": Required(fields.nested(_NAMED))}
_ALLOWED: Table = {
    "mode": Required(fields.one_of("auto", "required")),
    "tools": Required(
        fields.listed(fields.by_tag("type", {"function": _NAMED_FUNCTION}), settings.MOST_TOOLS, 1)
    ),
}
_CHOICES: dict[str, Table] = {
    "function": _NAMED_FUNCTION,
    "allowed_tools": {"allowed_tools": Required(fields.nested(_ALLOWED))},
}
_SCHEMA: Table = {
    "name": Required(settings.NAME),
    "description": fields.text,
    "schema": lambda value, path: value,
    "strict": fields.flag,  # the answer fits the schema in any case
}
_FORMATS: dict[str, Table] = {
    "text": fields.NOTHING,
    "json_object": fields.NOTHING,
    "json_schema": {"json_schema": Required(fields.nested(_SCHEMA))},
}
_TOOL = fields.by_tag("type", {"function": {"function": Required(fields.nested(FUNCTION))}})
_STREAM_OPTIONS: Table = {
    "include_usage": fields.flag,
    "include_obfuscation": fields.only("nothing leaves this process", False),
}
FIELDS: Table = {
    **settings.SHARED,
    "messages": Required(read_messages),
    "audio": fields.only(_TEXT_ONLY),
    "frequency_penalty": fields.number(-2, 2),
    "function_call": fields.only("use tool_choice"),
    "functions": fields.only("use tools"),
    "logit_bias": _read_bias,
    "logprobs": fields.flag,
    "max_completion_tokens": fields.whole(1, settings.MOST_TOKENS),
    "max_tokens": fields.whole(1, settings.MOST_TOKENS),
    "modalities": fields.only(_TEXT_ONLY, ["text"]),
    "n": fields.whole(1, 128),
    "prediction": fields.only("drafts are made by the engine"),
    "presence_penalty": fields.number(-2, 2),
    "reasoning_effort": fields.only(_NO_REASONING, "none"),
    "response_format": _read_format,
    "seed": fields.whole(-settings.MOST_SEED - 1, settings.MOST_SEED),
    "stop": _read_stop,
    "store": fields.only("completions are not stored: use the Responses API", False),
    "stream_options": fields.nested(_STREAM_OPTIONS),
    "tool_choice": _read_choice,
    "tools": fields.listed(_TOOL, settings.MOST_TOOLS),
    "verbosity": fields.only("the model's length is its own", "medium"),
    "web_search_options": fields.only("give a tool that searches"),
}


@frozen(kw_only=True)
class ChatRequest:
    """One checked body: what is wanted, and in which form the answer goes."""

    model: str
    wanted: Wanted
    streams: bool = False
    includes_usage: bool = False
    metadata: dict[str, str] | None = field(default=None)


def read_chat_request(value: Any) -> ChatRequest:
    """Raises Refusal, naming the field, for what is unknown, wrong, or cannot be served."""
    body = fields.read_object(value, "", FIELDS)
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise Refusal("max_tokens is max_completion_tokens: give one of them", "max_tokens")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise Refusal("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    if "stream_options" in body and not body.get("stream"):
        raise Refusal("stream_options needs stream to be true", "stream_options", "invalid_value")
    tools = ToolSet([settings.tool_of(row["function"]) for row in body.get("tools", ())])
    if not tools and "parallel_tool_calls" in body:
        raise Refusal("parallel_tool_calls needs tools", "parallel_tool_calls", "invalid_value")
    choice: Choice = body.get("tool_choice", settings.ANY_TOOL)
    return ChatRequest(
        model=body["model"],
        wanted=Wanted(
            messages=body["messages"],
            tools=tools,
            callable_tools=settings.chosen_tools(tools, choice, "tool_choice"),
            required=choice.required,
            parallel=body.get("parallel_tool_calls", True) and not choice.single,
            answer=body.get("response_format"),
            options=settings.generate_options(body, logprobs=body.get("logprobs", False)),
            max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
            affinity=body.get("prompt_cache_key", body.get("user")),
        ),
        streams=body.get("stream", False),
        includes_usage=body.get("stream_options", {}).get("include_usage", False),
        metadata=body.get("metadata"),
    )
