"""pydantic-ai: an engine as its `Model`, streaming.

    agent = Agent(AgentrtModel(engine), tools=[...], output_type=City)

Its settings may also have `agentrt_session` (names the conversation, whose KV is kept for it) and
`agentrt_grammar`. Cached tokens are in the usage, by tier in its details; `model.engine` is the
engine, for sessions and forks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentrt.adapters.answers import (
    Answers,
    CallBegun,
    CallText,
    Ended,
    Said,
    Text,
    Thought,
    offered_tool,
    wanted,
)
from agentrt.errors import MissingExtra, RequestInvalid
from agentrt.types import GenerateOptions, Message

try:
    from pydantic_ai import messages as parts
    from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
    from pydantic_ai.profiles import ModelProfile
    from pydantic_ai.settings import ModelSettings
except ImportError as exc:
    raise MissingExtra('this needs pydantic-ai: pip install "agentrt[pydantic-ai]"') from exc

from agentrt.adapters.pydantic_ai_messages import REASONS, answer_message, part_message, usage_of

if TYPE_CHECKING:
    from agentrt.adapters.openai.wanted import Wanted
    from agentrt.engine import Engine

SYSTEM = "agentrt"
_OPTIONS = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")


class AgentrtModel(Model[Any]):
    """The model of an open engine."""

    def __init__(self, engine: Engine, *, settings: ModelSettings | None = None) -> None:
        # The grammar holds an answer to its schema, so that none need be described in the prompt.
        profile = ModelProfile(supports_tools=True, supports_json_schema_output=True)
        super().__init__(settings=settings, profile=profile)
        self.engine = engine
        self._answers = Answers(engine)

    @property
    def model_name(self) -> str:
        return self.engine.model

    @property
    def system(self) -> str:
        return SYSTEM

    @property
    def provider(self) -> None:
        return None

    async def request(
        self,
        messages: list[parts.ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> parts.ModelResponse:
        request, parameters = self._wanted(messages, model_settings, model_request_parameters)
        response = _Response(
            parameters, _said=self._answers.stream(request), _model_name=self.model_name
        )
        async with aclosing(response._said):
            async for _ in response:
                pass
        return response.get()

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[parts.ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: Any = None,
    ) -> AsyncGenerator[StreamedResponse]:
        request, parameters = self._wanted(messages, model_settings, model_request_parameters)
        async with aclosing(self._answers.stream(request)) as said:
            yield _Response(parameters, _said=said, _model_name=self.model_name)

    def _wanted(
        self,
        messages: list[parts.ModelMessage],
        settings: ModelSettings | None,
        parameters: ModelRequestParameters,
    ) -> tuple[Wanted, ModelRequestParameters]:
        settings, parameters = self.prepare_request(settings, parameters)
        given: dict[str, Any] = dict(settings or {})
        tools = [*parameters.function_tools, *parameters.output_tools]
        shape = parameters.output_object if parameters.output_mode == "native" else None
        options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
        choice = given.get("tool_choice") or "auto"
        if choice == "auto" and tools and not parameters.allow_text_output:
            choice = "required"
        if not isinstance(choice, str):
            raise RequestInvalid(f"tool_choice must be a text, got {choice!r}")
        request = wanted(
            list(self._messages(messages, parameters)),
            tools=[offered_tool(t.name, t.description, t.parameters_json_schema) for t in tools],
            choice=choice,
            parallel=given.get("parallel_tool_calls", True),
            schema=None if shape is None else shape.json_schema,
            options=GenerateOptions(stop=tuple(given.get("stop_sequences") or ()), **options),
            max_tokens=given.get("max_tokens"),
            session=given.get("agentrt_session"),
            grammar=given.get("agentrt_grammar"),
        )
        return request, parameters

    def _messages(
        self, messages: list[parts.ModelMessage], parameters: ModelRequestParameters
    ) -> Iterator[Message]:
        instructions = self._get_instruction_parts(messages, parameters)
        if instructions:
            text = "\n\n".join(part.content for part in instructions)
            yield Message(role="system", content=text)
        for message in messages:
            if isinstance(message, parts.ModelResponse):
                yield answer_message(message)
            else:
                yield from map(part_message, message.parts)


@dataclass
class _Response(StreamedResponse):
    """An answer as pydantic-ai's events."""

    _said: AsyncGenerator[Said] = field(kw_only=True)
    _model_name: str = field(kw_only=True)
    _timestamp: datetime = field(default_factory=lambda: datetime.now(UTC), kw_only=True)

    async def _get_event_iterator(self) -> AsyncIterator[parts.ModelResponseStreamEvent]:
        manager = self._parts_manager
        async for said in self._said:
            if isinstance(said, Text):
                for event in manager.handle_text_delta(vendor_part_id="text", content=said.text):
                    yield event
            elif isinstance(said, Thought):
                for event in manager.handle_thinking_delta(
                    vendor_part_id="thoughts", content=said.text
                ):
                    yield event
            elif isinstance(said, CallBegun | CallText):
                begun = said if isinstance(said, CallBegun) else None
                moved = manager.handle_tool_call_delta(
                    vendor_part_id=f"call {said.number}",
                    tool_name=None if begun is None else begun.name,
                    args=said.text if isinstance(said, CallText) else None,
                    tool_call_id=None if begun is None else begun.id,
                )
                if moved is not None:
                    yield moved
            elif isinstance(said, Ended):
                self.finish_reason = REASONS[said.reason]
                if said.completion is not None:
                    self.provider_response_id = said.completion.request_id
                    self._usage = usage_of(said.completion.usage)

    async def close_stream(self) -> None:
        await self._said.aclose()

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def provider_name(self) -> str:
        return SYSTEM

    @property
    def provider_url(self) -> None:
        return None

    @property
    def timestamp(self) -> datetime:
        return self._timestamp
