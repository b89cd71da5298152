"""LangChain: an engine as a chat model, sync and async, streaming.

    chat = AgentrtChat(engine=engine)                   # on the engine's event loop
    with blocking_engine() as engine:                   # without one
        AgentrtChat(engine=engine).invoke("Hello")

`session` names the conversation, whose KV is kept for it; `grammar` is one of `agentrt.grammar`
(both also as arguments of a call). Cached tokens are in the usage, by tier in the response's
metadata; `chat.engine` is the engine, for sessions and forks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from agentrt.adapters.answers import (
    Answers,
    Ended,
    Said,
    wanted,
)
from agentrt.adapters.blocking import Bridge, bridge_of
from agentrt.errors import MissingExtra, RequestInvalid
from agentrt.types import GenerateOptions

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
    from langchain_core.messages import AIMessageChunk, BaseMessage
    from langchain_core.outputs import ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from pydantic import ConfigDict, PrivateAttr
except ImportError as exc:
    raise MissingExtra('this needs langchain-core: pip install "agentrt[langchain]"') from exc

from agentrt.adapters.langchain_messages import choice_of, chunk_of, message_of, tool_of, usage_of

_FIELDS = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")


class AgentrtChat(BaseChatModel):
    """The chat model of an open engine."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Any
    """An Engine that was opened on the running event loop, or a Bridge to one."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    stop: list[str] | None = None
    tool_choice: str = "auto"
    """Where a call does not say it: "once" is a call after each message of the user, and then an
    answer in text, since small models call again and again if they may."""
    parallel_tool_calls: bool = True
    session: str | None = None
    grammar: str | None = None
    timeout: float | None = None
    max_retries: int | None = None
    _bridge: Bridge = PrivateAttr()
    _answers: Answers = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        for name in ("timeout", "max_retries"):
            if getattr(self, name):
                raise RequestInvalid(f"{name}: nothing is sent that could be lost; leave it out")
        self._bridge = bridge_of(self.engine)
        self.engine = self._bridge.engine
        self._answers = Answers(self.engine)

    @property
    def _llm_type(self) -> str:
        return "agentrt"

    @property
    def model_name(self) -> str:
        """As the engine was given it."""
        return str(self.engine.model)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.engine.model, **{name: getattr(self, name) for name in _FIELDS}}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with these tools. `tool_choice` is "any", "auto", "none", "once" or a name."""
        kwargs.pop("strict", None)  # calls fit their schema in any case
        formatted = [convert_to_openai_tool(each) for each in tools]
        return self.bind(tools=formatted, tool_choice=choice_of(tool_choice), **kwargs)

    def _said(
        self, messages: list[BaseMessage], stop: list[str] | None, settings: Mapping[str, Any]
    ) -> Any:
        known = {"tools", "tool_choice", "session", "grammar", "max_tokens", *_FIELDS}
        known |= {"parallel_tool_calls", "schema", "ls_structured_output_format"}
        if unknown := sorted(set(settings) - known):
            raise RequestInvalid(f"unknown arguments: {', '.join(unknown)}")

        def setting(name: str) -> Any:
            return settings.get(name, getattr(self, name))

        tools = [tool_of(each) for each in settings.get("tools", ())]
        request = wanted(
            [message_of(each) for each in messages],
            tools=tools,
            choice=settings.get("tool_choice") or (self.tool_choice if tools else "auto"),
            parallel=setting("parallel_tool_calls"),
            schema=settings.get("schema"),
            options=GenerateOptions(
                stop=tuple(stop or self.stop or ()), **{name: setting(name) for name in _FIELDS}
            ),
            max_tokens=setting("max_tokens"),
            session=setting("session"),
            grammar=setting("grammar"),
        )
        return lambda: self._answers.stream(request)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for said in self._bridge.iterate(self._said(messages, stop, kwargs)):
            chunk = self._chunk(said)
            if chunk is not None:
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(self._bridge.stream(self._said(messages, stop, kwargs))) as parts:
            async for said in parts:
                chunk = self._chunk(said)
                if chunk is not None:
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = [each async for each in self._astream(messages, stop, run_manager, **kwargs)]
        return generate_from_stream(iter(chunks))

    def _chunk(self, said: Said) -> ChatGenerationChunk | None:
        message = self._last(said) if isinstance(said, Ended) else chunk_of(said)
        return None if message is None else ChatGenerationChunk(message=message)

    def _last(self, ended: Ended) -> AIMessageChunk:
        facts: dict[str, Any] = {"model_name": self.engine.model, "finish_reason": ended.reason}
        if ended.completion is not None:
            facts["cached_tokens"] = dict(ended.completion.usage.cached_tokens)
            facts["request_id"] = ended.completion.request_id
        return AIMessageChunk(
            content="",
            response_metadata={**facts, "model_provider": "agentrt"},
            usage_metadata=None if ended.completion is None else usage_of(ended.completion),
            chunk_position="last",
        )
