"""pydantic-ai's messages as our own."""

from __future__ import annotations

from pydantic_ai import messages as parts
from pydantic_ai.usage import RequestUsage

from agentrt.errors import RequestInvalid
from agentrt.types import Message, ToolCall, Usage

REASONS: dict[str, parts.FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_call",
    "content_filter": "content_filter",
}


def answer_message(message: parts.ModelResponse) -> Message:
    """What the model said before."""
    text = "".join(each.content for each in message.parts if isinstance(each, parts.TextPart))
    calls = [
        ToolCall(each.tool_call_id, each.tool_name, each.args_as_dict())
        for each in message.parts
        if isinstance(each, parts.ToolCallPart)
    ]
    return Message(role="assistant", content=text, tool_calls=tuple(calls))


def part_message(part: parts.ModelRequestPart) -> Message:
    """A part of what it was told. Raises RequestInvalid for what is no text."""
    if isinstance(part, parts.SystemPromptPart):
        return Message(role="system", content=part.content)
    if isinstance(part, parts.ToolReturnPart):
        content, name = part.model_response_str(), part.tool_name
        return Message(role="tool", content=content, name=name, tool_call_id=part.tool_call_id)
    if isinstance(part, parts.RetryPromptPart):
        text = part.model_response()
        if part.tool_name is None:
            return Message(role="user", content=text)
        name, call_id = part.tool_name, part.tool_call_id
        return Message(role="tool", content=text, name=name, tool_call_id=call_id)
    if not isinstance(part, parts.UserPromptPart):
        raise RequestInvalid(f"the model reads text, not {type(part).__name__}")
    if isinstance(part.content, str):
        return Message(role="user", content=part.content)
    wrong = [each for each in part.content if not isinstance(each, str)]
    if wrong:
        raise RequestInvalid(f"the model reads text, not {type(wrong[0]).__name__}")
    return Message(role="user", content="\n".join(map(str, part.content)))


def usage_of(usage: Usage) -> RequestUsage:
    """What an answer cost, cached tokens by tier in the details."""
    cached = {f"cached_{tier}_tokens": count for tier, count in usage.cached_tokens.items()}
    return RequestUsage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=sum(usage.cached_tokens.values()),
        details=cached,
    )
