"""What every framework's adapter asks an engine: a whole conversation in, an answer out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field, frozen

from agentrt.adapters.openai.asking import Asking
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.schemas import closed, standalone
from agentrt.adapters.openai.settings import CHOICES, Choice, named_choice, tool_of
from agentrt.adapters.openai.telling import (
    CallBegun,
    CallEnded,
    CallText,
    Ended,
    EndReason,
    Said,
    Telling,
    Text,
    Thought,
)
from agentrt.adapters.openai.wanted import Wanted
from agentrt.errors import RequestInvalid
from agentrt.grammar import json_value
from agentrt.parsers_families import LLAMA_PYTHONIC
from agentrt.tools import Tool, ToolSet
from agentrt.types import Completion, GenerateOptions, Message, Usage

if TYPE_CHECKING:
    from agentrt.chat import Chat
    from agentrt.engine import Engine

__all__ = ["Answers", "CallBegun", "CallEnded", "CallText", "Ended", "Said", "Text", "Thought"]


@frozen
class Called:
    """A call that the model made; `arguments` are JSON."""

    id: str
    name: str
    arguments: str


@frozen(kw_only=True)
class Answer:
    """A whole answer."""

    text: str
    thoughts: str
    calls: tuple[Called, ...]
    reason: EndReason
    completion: Completion | None

    @property
    def usage(self) -> Usage:
        """What it cost. A guard's end has no completion, and so no cost is known."""
        if self.completion is None:
            return Usage(
                prompt_tokens=0, cached_tokens={}, output_tokens=0, ttft_s=0.0, total_s=0.0
            )
        return self.completion.usage


@frozen(kw_only=True)
class _Held(Wanted):
    """Wanted, and a whole grammar of the caller's."""

    grammar: str | None = None

    def fitted(self, chat: Chat, rendered: str, most_tokens: int) -> GenerateOptions:
        fitted = super().fitted(chat, rendered, most_tokens)
        return fitted if self.grammar is None else evolve(fitted, grammar=self.grammar)


def wanted(
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    choice: str = "auto",
    parallel: bool = True,
    schema: Mapping[str, Any] | None = None,
    options: GenerateOptions | None = None,
    max_tokens: int | None = None,
    session: str | None = None,
    grammar: str | None = None,
) -> Wanted:
    """A request. `choice` is "auto", "none", "required", a tool's name, or "once": one call after a
    message of the user, and then text. `schema` holds a text answer to JSON; `session` names the
    conversation, `grammar` is one of `agentrt.grammar`.

    Raises RequestInvalid where that does not go together.
    """
    offered = ToolSet(tools)
    if choice == "once":
        is_answered = messages[-1].role == "tool"
        choice, parallel = ("none" if is_answered else "required"), False
    if grammar is not None and (offered or schema is not None):
        raise RequestInvalid("a grammar excludes tools and a schema: they are grammars too")
    chosen: Choice = CHOICES.get(choice) or named_choice(choice)
    if chosen.allowed and offered.get(choice) is None:
        raise RequestInvalid(f"no tool is named {choice!r}; there are {', '.join(offered.names)}")
    if chosen.required and not offered:
        raise RequestInvalid(f"the tool choice {choice!r} needs tools")
    callable_tools = offered
    if chosen.allowed is not None:
        callable_tools = ToolSet([each for each in offered if each.name in chosen.allowed])
    return _Held(
        messages=tuple(messages),
        tools=offered,
        callable_tools=callable_tools,
        required=chosen.required,
        parallel=parallel and not chosen.single,
        answer=None if schema is None else json_value(dict(schema)),
        options=options or GenerateOptions(),
        max_tokens=max_tokens,
        affinity=session,
        grammar=grammar,
    )


def offered_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> Tool:
    """A tool that the framework runs."""
    schema = closed(parameters or {"type": "object", "properties": {}})
    try:
        whole = standalone(schema, f"tool {name}")
    except Refusal as exc:
        raise RequestInvalid(str(exc)) from exc
    return tool_of({"name": name, "description": description or "", "parameters": whole})


@define(eq=False)
class Answers:
    """Asks one engine, which must stay open. Keeps the token logs of the conversations that come
    back with more messages, so that they go on from what the model wrote, token for token."""

    engine: Engine
    _asking: Asking | None = field(default=None, init=False)

    async def stream(self, request: Wanted) -> AsyncGenerator[Said]:
        """What the model says, as it comes; Ended last. Leaving the iterator cancels.

        Raises what `Engine.stream` raises.
        """
        if self._asking is None:
            self._asking = Asking(self.engine, self.engine.text)
        asked = await self._asking.ask(request)
        text = self.engine.text
        telling = Telling(text.call_format is not LLAMA_PYTHONIC, text.eos_token_ids)
        try:
            async for batch in asked.choices:
                said = telling.push(batch)
                if batch.completion is not None and not batch.is_changed:
                    await self._asking.keep(asked, batch.completion, telling.tool_names)
                for each in said:
                    yield each
        finally:
            await asked.choices.aclose()

    async def whole(self, request: Wanted) -> Answer:
        """The answer, once it is complete."""
        text, thoughts, end = "", "", None
        calls: list[Called] = []
        async with aclosing(self.stream(request)) as parts:
            async for said in parts:
                if isinstance(said, Text):
                    text += said.text
                elif isinstance(said, Thought):
                    thoughts += said.text
                elif isinstance(said, CallBegun):
                    calls.append(Called(said.id, said.name, ""))
                elif isinstance(said, CallText):
                    last = calls[-1]
                    calls[-1] = evolve(last, arguments=last.arguments + said.text)
                elif isinstance(said, Ended):
                    end = said
        assert end is not None
        return Answer(
            text=text,
            thoughts=thoughts,
            calls=tuple(calls),
            reason=end.reason,
            completion=end.completion,
        )
