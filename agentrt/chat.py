"""The text side of a model: tokenizer, chat template and grammars. Loads no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from attrs import define, evolve, field

from agentrt.errors import RequestInvalid
from agentrt.parsers import THINK_CLOSE, THINK_OPEN, CallFormat, TurnParser
from agentrt.parsers_families import FORMATS, HERMES, format_of
from agentrt.request import prompt_array
from agentrt.token_log import INLINE_CHARACTERS, check_text, guard
from agentrt.tool_prompt import render_result, render_tool_section
from agentrt.types import GenerateOptions, Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agentrt.grammar import Constraint, GrammarCompiler
    from agentrt.grammar_calls import Thinking, TurnShape
    from agentrt.output import TextDecoder
    from agentrt.template import ChatTemplate
    from agentrt.tokenizer import Tokenizer
    from agentrt.tools import ToolSet

Prompt = str | Sequence[int]


class NoText:
    """The decoder of a model without a tokenizer: token ids only."""

    def push(self, ids: Iterable[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


@define
class Chat:
    """Owns the grammar compiler, which is built at the first grammar.

    `tool_format` names a family's format of tool calls; "auto" is the one that the chat template
    shows, or where it shows none, our default: that of Hermes, told in the system message.
    """

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    vocab_size: int
    eos_token_ids: frozenset[int]
    tool_format: str = "auto"
    _compiler: GrammarCompiler | None = field(default=None, init=False)
    _building: anyio.Lock = field(factory=anyio.Lock, init=False)

    @property
    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer, for who cannot do without. Raises RequestInvalid where there is none."""
        if self.tokenizer is None:
            raise RequestInvalid("this model has no tokenizer: pass token ids")
        return self.tokenizer

    def decoder(self) -> TextDecoder:
        return NoText() if self.tokenizer is None else self.tokenizer.stream()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; without a tokenizer, their ids."""
        ids = [int(token) for token in ids]
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        stream = self.tokenizer.stream()
        return stream.push(ids) + stream.flush()

    async def prompt_ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """A prompt as checked ids; long text is encoded in a worker thread.

        Raises RequestInvalid.
        """
        if not isinstance(prompt, str | bytes | bytearray):
            return prompt_array(prompt, self.vocab_size)
        text, encode = check_text(prompt), self.needed_tokenizer.encode
        if len(text) <= INLINE_CHARACTERS:
            return prompt_array(encode(text), self.vocab_size)
        return prompt_array(await anyio.to_thread.run_sync(encode, text), self.vocab_size)

    @property
    def call_format(self) -> CallFormat:
        """How this model writes tool calls."""
        if self.tool_format != "auto":
            return FORMATS[self.tool_format]
        source = "" if self.template is None else self.template.tool_source
        return format_of(source) or HERMES

    @property
    def takes_tools(self) -> bool:
        """Whether the template tells the model of its tools, in the format that we read."""
        if self.template is None or not self.template.supports_tools:
            return False
        return format_of(self.template.tool_source) is self.call_format

    @property
    def thinks(self) -> bool:
        """Whether the model may begin with a block of reasoning."""
        return self.template is not None and THINK_CLOSE in self.template.source

    def thinking(self, rendered: str) -> Thinking:
        """What the answer to this rendered conversation begins with."""
        if not self.thinks:
            return "no"
        end = rendered.rstrip()
        if end.endswith(THINK_OPEN):
            return "inside"
        return "no" if end.endswith(THINK_CLOSE) else "block"

    def parser(self, rendered: str, tools: ToolSet, first_call: int) -> TurnParser:
        """For the answer to this rendered conversation."""
        thinking = self.thinking(rendered)
        return TurnParser(
            self.call_format if tools else None,
            names=tools.names,
            first_call=first_call,
            thinks=thinking == "block",
            is_thinking=thinking == "inside",
        )

    def turn_shape(self, rendered: str, **shape: Any) -> TurnShape:
        """What that answer may be, for its grammar."""
        from agentrt.grammar_calls import TurnShape

        assert self.tokenizer is not None
        special = self.tokenizer.special_tokens
        return TurnShape(thinking=self.thinking(rendered), special=special, **shape)

    async def constraint(self, options: GenerateOptions, max_tokens: int) -> Constraint | None:
        """Compile a request's grammar in a worker thread. Raises GrammarInvalid."""
        if options.grammar is None:
            return None
        end = max_tokens if options.end_in_time else None
        async with self._building:
            if self._compiler is None:
                self._compiler = await anyio.to_thread.run_sync(self._build_compiler)
        return await anyio.to_thread.run_sync(self._compiler.compile, options.grammar, end)

    def _build_compiler(self) -> GrammarCompiler:
        from agentrt.grammar import GrammarCompiler

        if self.tokenizer is None or self.tokenizer.backend is None:
            raise RequestInvalid("grammars need a model with a tokenizers-library tokenizer")
        return GrammarCompiler(self.tokenizer.backend, self.vocab_size, self.eos_token_ids)

    def render(self, messages: Sequence[Message], tools: ToolSet) -> str:
        """A conversation as text, ready for the model's answer. Special tokens' text inside
        messages is guarded (see token_log). Raises TemplateError or RequestInvalid."""
        if self.template is None or self.tokenizer is None:
            raise RequestInvalid("this model has no chat template: use generate with token ids")
        native = self.takes_tools
        if tools and not native:
            section = render_tool_section(tools, self.call_format)
            messages = _with_tool_section(_with_plain_results(messages), section)
        special = self.tokenizer.special_tokens
        guarded = [evolve(message, content=guard(message.content, special)) for message in messages]
        schemas = tools.schemas() if tools and native else None
        return self.template.render(guarded, schemas, add_generation_prompt=True)

    def shown(self, text: str, stop_token_id: int | None) -> str:
        """Generated text as a template will show it in the next turn."""
        assert self.tokenizer is not None
        ending = ""
        if stop_token_id is not None:
            ending = next(
                (t for t, token in self.tokenizer.special_tokens.items() if token == stop_token_id),
                "",
            )
        return guard(text, self.tokenizer.special_tokens) + ending


def _with_tool_section(messages: Sequence[Message], section: str) -> list[Message]:
    """Put the tools into the system message, or make one of them."""
    if messages and messages[0].role == "system":
        system = evolve(messages[0], content=f"{messages[0].content}\n\n{section}")
        return [system, *messages[1:]]
    return [Message(role="system", content=section), *messages]


def _with_plain_results(messages: Sequence[Message]) -> list[Message]:
    """The results of a step as one message of the user: a template without tools may refuse any
    other role, or the same one twice in a row."""
    plain: list[Message] = []
    for is_result, group in itertools.groupby(messages, key=lambda message: message.role == "tool"):
        if is_result:
            content = "\n".join(render_result(message.content) for message in group)
            plain.append(Message(role="user", content=content))
        else:
            plain.extend(group)
    return plain
