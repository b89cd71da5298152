"""Conversations that come back as messages, and the token logs that they left here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from agentrt.cache.evict import SessionState
from agentrt.template import stable_prefix
from agentrt.token_log import TokenLog

if TYPE_CHECKING:
    from agentrt.engine import Engine
    from agentrt.tokenizer import Tokenizer
    from agentrt.types import Message

MOST_TOKENS = 1 << 20  # of all logs: about 40 MB
MOST_BRANCHES = 8  # logs of one conversation, which may have been answered more than once


@frozen
class Conversation:
    """What tells conversations apart: the caller's own name for one, if it gives any, and how it
    begins, up to the user's first words."""

    name: str | None
    beginning: str


def conversation_of(name: str | None, messages: Sequence[Message]) -> Conversation:
    beginning = []
    for message in messages:
        beginning.append(message.content)
        if message.role == "user":
            break
    return Conversation(name, "\0".join(beginning))


@define(eq=False)
class Kept:
    """A log, and the pause of its session where the model waits for the caller's tools."""

    log: TokenLog
    pause: AsyncExitStack = field(factory=AsyncExitStack)


@define(eq=False)
class Affinity:
    """Finds the log that a conversation goes on from, so that what the model wrote stays the tokens
    that it wrote, and its KV stays valid: text that is encoded anew may become other tokens.

    Owns the logs, least recently used first. Invariant: they hold `MOST_TOKENS` ids at most.
    """

    engine: Engine
    tokenizer: Tokenizer
    _logs: OrderedDict[Conversation, list[Kept]] = field(factory=OrderedDict, init=False)
    _num_tokens: int = field(default=0, init=False)

    async def log_of(self, conversation: Conversation, rendered: str) -> TokenLog:
        """A copy of the log that has most in common with the text. Ends the pause of its tools."""
        branches = self._logs.get(conversation)
        if not branches:
            return TokenLog(self.tokenizer)
        self._logs.move_to_end(conversation)
        best = max(branches, key=lambda kept: stable_prefix(kept.log.text, rendered))
        await best.pause.aclose()
        return best.log.copy()

    async def keep(
        self, conversation: Conversation, log: TokenLog, tool_names: Sequence[str] = ()
    ) -> None:
        """Take the log of an answer. Where it called tools of a named conversation, its KV may make
        room until the results come, and is brought back when such tools usually end."""
        kept = Kept(log)
        if conversation.name is not None:
            self.engine.mark(log.ids, SessionState.IDLE)
            for name in tool_names:
                await kept.pause.enter_async_context(self.engine.pause(log.ids, name))
        branches = self._logs.setdefault(conversation, [])
        self._logs.move_to_end(conversation)
        passed = [each for each in branches if log.text.startswith(each.log.text)]
        if len(branches) - len(passed) >= MOST_BRANCHES:
            passed.append(next(each for each in branches if each not in passed))
        branches.append(kept)
        self._num_tokens += len(log.ids)
        await self._drop(branches, passed)
        while self._num_tokens > MOST_TOKENS:
            _, oldest = self._logs.popitem(last=False)
            await self._drop(oldest, list(oldest))

    async def aclose(self) -> None:
        """Forget all logs."""
        while self._logs:
            _, branches = self._logs.popitem()
            await self._drop(branches, list(branches))

    async def _drop(self, branches: list[Kept], gone: Sequence[Kept]) -> None:
        for kept in gone:
            branches.remove(kept)
            self._num_tokens -= len(kept.log.ids)
        for kept in gone:
            await kept.pause.aclose()

    def check(self) -> None:
        """Assert the invariant."""
        sizes = [len(kept.log.ids) for kepts in self._logs.values() for kept in kepts]
        assert self._num_tokens == sum(sizes) <= MOST_TOKENS
