"""What a request wants of the engine, whichever of OpenAI's two forms it came in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from agentrt.grammar_calls import text_without_calls, thinking_then, tool_calls
from agentrt.tools import ToolSet
from agentrt.types import GenerateOptions, Message

if TYPE_CHECKING:
    from agentrt.chat import Chat


@frozen(kw_only=True)
class Wanted:
    """`callable_tools` are those of `tools` that may be called; the model is told of all of them,
    so that a choice does not change the prompt. `answer` is the rule of an answer that is not free
    text. `max_tokens` None is as many as fit. `affinity` names the conversation."""

    messages: tuple[Message, ...]
    tools: ToolSet = field(factory=ToolSet)
    callable_tools: ToolSet = field(factory=ToolSet)
    required: bool = False
    parallel: bool = True
    answer: str | None = None
    options: GenerateOptions
    max_tokens: int | None = None
    affinity: str | None = None

    @property
    def num_calls(self) -> int:
        """Calls that were made before."""
        return sum(len(message.tool_calls) for message in self.messages)

    def fitted(self, chat: Chat, rendered: str, most_tokens: int) -> GenerateOptions:
        """The options of the answer to this rendered conversation, for which so many tokens fit."""
        return evolve(
            self.options,
            max_tokens=max(1, most_tokens) if self.max_tokens is None else self.max_tokens,
            grammar=self._grammar(chat, rendered),
        )

    def _grammar(self, chat: Chat, rendered: str) -> str | None:
        if not self.tools and self.answer is None:
            return None
        shape = chat.turn_shape(
            rendered, required=self.required, parallel=self.parallel, answer=self.answer
        )
        if not self.tools:
            assert self.answer is not None
            return thinking_then(self.answer, shape.thinking, shape.special)
        if self.callable_tools:
            return tool_calls(self.callable_tools, chat.call_format, shape)
        return text_without_calls(chat.call_format, shape)
