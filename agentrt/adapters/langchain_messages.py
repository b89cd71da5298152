"""LangChain's messages and tools as our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCallChunk

from agentrt.adapters.answers import CallBegun, CallText, Said, Text, Thought, offered_tool
from agentrt.errors import RequestInvalid
from agentrt.tools import Tool
from agentrt.types import Completion, Message, ToolCall

_CHOICES = {"any": "required", "required": "required", "auto": "auto", "none": "none"}


def message_of(message: BaseMessage) -> Message:
    """Raises RequestInvalid for what is no text."""
    text = _text(message.content)
    if isinstance(message, SystemMessage):
        return Message(role="system", content=text)
    if isinstance(message, HumanMessage):
        return Message(role="user", content=text, name=message.name)
    if isinstance(message, ToolMessage):
        prefix = "Error: " if message.status == "error" and not text.startswith("Error") else ""
        return Message(
            role="tool",
            content=prefix + text,
            name=message.name,
            tool_call_id=message.tool_call_id,
        )
    if isinstance(message, AIMessage):
        calls = tuple(
            ToolCall(call["id"] or "", call["name"], call["args"]) for call in message.tool_calls
        )
        return Message(role="assistant", content=text, tool_calls=calls)
    if isinstance(message, ChatMessage) and message.role in ("system", "user", "assistant"):
        role: Any = message.role
        return Message(role=role, content=text)
    raise RequestInvalid(f"a message is of the system, user, assistant or a tool, not {message!r}")


def _text(content: str | list[str | dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(map(_part, content))


def _part(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind in ("tool_use", "tool_call", "tool_call_chunk"):
        return ""  # said again in the message's tool_calls
    raise RequestInvalid(f"the model reads text, not {kind}")


def tool_of(tool: Mapping[str, Any]) -> Tool:
    """A tool in OpenAI's form."""
    function = tool["function"]
    return offered_tool(function["name"], function.get("description"), function.get("parameters"))


def choice_of(choice: str | dict[str, Any] | bool | None) -> str | None:
    """Which tools may be called; None leaves that to the model's own setting."""
    if isinstance(choice, dict):
        choice = str(choice.get("function", choice)["name"])
    if isinstance(choice, bool):
        return "required" if choice else None
    return None if choice is None else _CHOICES.get(choice, choice)


def usage_of(completion: Completion) -> UsageMetadata:
    """What an answer cost."""
    usage = completion.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.prompt_tokens + usage.output_tokens,
        input_token_details={"cache_read": sum(usage.cached_tokens.values())},
    )


def chunk_of(said: Said) -> AIMessageChunk | None:
    """What the model just said, as a piece of LangChain's message."""
    if isinstance(said, Text):
        return AIMessageChunk(content=said.text)
    if isinstance(said, Thought):
        return AIMessageChunk(content="", additional_kwargs={"reasoning_content": said.text})
    if isinstance(said, CallBegun):
        return _call_chunk(said.number, id=said.id, name=said.name, args=None)
    if isinstance(said, CallText):
        return _call_chunk(said.number, id=None, name=None, args=said.text)
    return None


def _call_chunk(
    number: int, *, id: str | None, name: str | None, args: str | None
) -> AIMessageChunk:
    chunk = ToolCallChunk(index=number, id=id, name=name, args=args)
    return AIMessageChunk(content="", tool_call_chunks=[chunk])
