"""smolagents: an engine as the `Model` of its agents, streaming.

    with blocking_engine() as engine:
        ToolCallingAgent(tools=[...], model=AgentrtModel(engine)).run("...")

Settings, of the model or of one `generate`, are those of GenerateOptions by name, `max_tokens`,
`session` (names the conversation) and `grammar`. The completion, with its cached tokens by tier,
is each message's `raw`; `model.engine` is the engine, for sessions and forks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import fields_dict

from agentrt.adapters.answers import (
    Answer,
    Answers,
    CallBegun,
    CallText,
    Ended,
    Text,
    offered_tool,
    wanted,
)
from agentrt.adapters.blocking import Bridge, bridge_of
from agentrt.errors import MissingExtra, RequestInvalid
from agentrt.types import GenerateOptions, Message

try:
    from smolagents.models import (
        ChatMessage,
        ChatMessageStreamDelta,
        ChatMessageToolCall,
        ChatMessageToolCallFunction,
        ChatMessageToolCallStreamDelta,
        MessageRole,
        Model,
        TokenUsage,
    )
except ImportError as exc:
    raise MissingExtra('this needs smolagents: pip install "agentrt[smolagents]"') from exc

if TYPE_CHECKING:
    from agentrt.adapters.openai.wanted import Wanted
    from agentrt.engine import Engine
    from agentrt.types import Usage

_OPTIONS = set(fields_dict(GenerateOptions)) - {"grammar", "stop", "n", "max_tokens"}
_OTHERS = {"max_tokens", "session", "grammar", "parallel_tool_calls"}
_KNOWN = _OPTIONS | _OTHERS | {"messages", "stop", "tools", "tool_choice", "response_format"}


class AgentrtModel(Model):
    """The model of an open engine. Agents of smolagents block: open it with `blocking_engine`, or
    run them in a thread beside the engine's event loop."""

    def __init__(self, engine: Engine | Bridge, **settings: Any) -> None:
        self._bridge = bridge_of(engine)
        self.engine = self._bridge.engine
        self._answers = Answers(self.engine)
        super().__init__(flatten_messages_as_text=True, model_id=self.engine.model, **settings)

    @property
    def supports_stop_parameter(self) -> bool:
        return True

    def generate(
        self,
        messages: list[ChatMessage],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, Any] | None = None,
        tools_to_call_from: list[Any] | None = None,
        **kwargs: Any,
    ) -> ChatMessage:
        """A whole answer."""
        request = self._wanted(
            messages, stop_sequences, response_format, tools_to_call_from, kwargs
        )
        return _message(self._bridge.whole(self._answers, request))

    def generate_stream(
        self,
        messages: list[ChatMessage],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, Any] | None = None,
        tools_to_call_from: list[Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatMessageStreamDelta]:
        """The same as it comes; leaving the iterator cancels."""
        request = self._wanted(
            messages, stop_sequences, response_format, tools_to_call_from, kwargs
        )
        for said in self._bridge.iterate(lambda: self._answers.stream(request)):
            if isinstance(said, Text):
                yield ChatMessageStreamDelta(content=said.text)
            elif isinstance(said, CallBegun):
                function = ChatMessageToolCallFunction(name=said.name, arguments="")
                yield _call_delta(said.number, function, said.id)
            elif isinstance(said, CallText):
                function = ChatMessageToolCallFunction(name="", arguments=said.text)
                yield _call_delta(said.number, function, None)
            elif isinstance(said, Ended) and said.completion is not None:
                yield ChatMessageStreamDelta(token_usage=_usage(said.completion.usage))

    def _wanted(
        self,
        messages: list[ChatMessage],
        stop: list[str] | None,
        form: dict[str, Any] | None,
        tools: list[Any] | None,
        settings: dict[str, Any],
    ) -> Wanted:
        given = self._prepare_completion_kwargs(messages, stop, form, tools, **settings)
        if unknown := sorted(set(given) - _KNOWN):
            raise RequestInvalid(f"unknown settings: {', '.join(unknown)}")
        options = {name: given[name] for name in _OPTIONS & set(given)}
        offered = [_tool(each["function"]) for each in given.get("tools", ())]
        return wanted(
            [
                Message(role=each["role"], content=_text(each["content"]))
                for each in given["messages"]
            ],
            tools=offered,
            choice=_choice(given.get("tool_choice")) if offered else "auto",
            parallel=given.get("parallel_tool_calls", True),
            schema=_schema(given.get("response_format")),
            options=GenerateOptions(stop=tuple(given.get("stop") or ()), **options),
            max_tokens=given.get("max_tokens"),
            session=given.get("session"),
            grammar=given.get("grammar"),
        )


def _tool(function: Mapping[str, Any]) -> Any:
    return offered_tool(function["name"], function.get("description"), function.get("parameters"))


def _choice(choice: str | Mapping[str, Any] | None) -> str:
    if isinstance(choice, Mapping):
        return str(choice["function"]["name"])
    return choice or "auto"


def _schema(form: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise RequestInvalid(f"response_format is a json_schema, got {form.get('type')!r}")
    schema: Mapping[str, Any] = form["json_schema"]["schema"]
    return schema


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    wrong = [part.get("type") for part in content if part.get("type") != "text"]
    if wrong:
        raise RequestInvalid(f"the model reads text, not {wrong[0]}")
    return "\n".join(part["text"] for part in content)


def _message(answer: Answer) -> ChatMessage:
    calls = [
        ChatMessageToolCall(
            function=ChatMessageToolCallFunction(name=call.name, arguments=call.arguments),
            id=call.id,
            type="function",
        )
        for call in answer.calls
    ]
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        content=answer.text,
        tool_calls=calls or None,
        raw=answer.completion,
        token_usage=_usage(answer.usage),
    )


def _call_delta(
    number: int, function: ChatMessageToolCallFunction, call_id: str | None
) -> ChatMessageStreamDelta:
    call = ChatMessageToolCallStreamDelta(
        index=number, id=call_id, type="function", function=function
    )
    return ChatMessageStreamDelta(tool_calls=[call])


def _usage(usage: Usage) -> TokenUsage:
    return TokenUsage(input_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens)
