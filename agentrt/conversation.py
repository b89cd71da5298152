"""The messages of a session and the token log that stands for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio.to_thread
from attrs import define, field

from agentrt.token_log import INLINE_CHARACTERS, TokenLog, encode_guarded
from agentrt.types import Completion, Message, ToolCall, ToolResult

if TYPE_CHECKING:
    from agentrt.chat import Chat
    from agentrt.tools import ToolSet

_CUT = "\ufdd2"  # a noncharacter of Unicode: marks the end of a message that is not complete


@define(eq=False)
class Conversation:
    """Changed by its session's one turn alone. Invariant: between turns the log stands for a
    beginning of the rendered messages, and the model has read or written every token of it."""

    chat: Chat
    tools: ToolSet
    log: TokenLog
    messages: list[Message] = field(factory=list)
    num_calls: int = 0
    _rewrites_seen: int = field(default=0, init=False)

    def copy(self) -> Conversation:
        """An equal one that goes its own way."""
        return Conversation(
            self.chat, self.tools, self.log.copy(), list(self.messages), self.num_calls
        )

    def take_back(self, before: Conversation) -> None:
        """Become what `before` was copied from."""
        self.messages, self.log = before.messages, before.log
        self.num_calls = before.num_calls

    async def render(self) -> None:
        """Bring the log up to the messages; long new text is encoded in a worker thread."""
        rendered, log = self.chat.render(self.messages, self.tools), self.log
        if len(rendered) - len(log.text) <= INLINE_CHARACTERS:
            log.update(rendered)
        else:
            await anyio.to_thread.run_sync(log.update, rendered)

    def take_rewrites(self) -> int:
        """How often the log was rewritten since the last time."""
        rewrites = self.log.rewrites - self._rewrites_seen
        self._rewrites_seen = self.log.rewrites
        return rewrites

    def note(
        self, completion: Completion, plain: str, calls: Sequence[ToolCall], *, content: str | None
    ) -> None:
        """Append what was generated: ids as they are, text as the template will show it.

        Where guards changed it, `content` is what they left: the log forgets the rest.
        """
        keeps_text = not calls or self.chat.call_format.keeps_text
        self.num_calls += len(calls)
        text = completion.text if content is None else content
        if keeps_text:
            self.messages.append(Message(role="assistant", content=text))
        else:
            made = Message(role="assistant", content=plain.strip(), tool_calls=tuple(calls))
            self.messages.append(made)
        if content is None:
            last = completion.token_ids[-1] if completion.token_ids else None
            ended = last if last in self.chat.eos_token_ids else None
            self.log.append_generated(completion.token_ids, self.chat.shown(text, ended))

    def add_stopped(self, text: str) -> None:
        """Append an answer that a guard ended, as far as it was shown."""
        self.messages.append(Message(role="assistant", content=text.rstrip()))

    def add_result(self, result: ToolResult) -> None:
        """Append a tool's result."""
        self.messages.append(_tool_message(result.call, result.content))

    def ahead(self, results: Sequence[ToolResult], call: ToolCall, partial: str) -> list[int]:
        """The tokens that the next prompt will begin with, as far as `partial` tells: it is what
        the tool of `call` said so far, `results` are those of the calls before it. Encoded up to
        the last word, which may go on."""
        shown = [*self.messages, *(_tool_message(each.call, each.content) for each in results)]
        shown.append(_tool_message(call, f"{partial}{_CUT}"))
        text = self.chat.render(shown, self.tools).partition(_CUT)[0]
        if not text.startswith(self.log.text):
            return []
        new = text[len(self.log.text) :]
        end = len(new.rstrip())
        while end and not new[end - 1].isspace():
            end -= 1
        return [*self.log.ids, *encode_guarded(new[:end].rstrip(), self.log.tokenizer)]


def _tool_message(call: ToolCall, content: str) -> Message:
    return Message(role="tool", content=content, name=call.name, tool_call_id=call.id)
