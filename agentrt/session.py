"""Session: one conversation, token-exact, with the whole tool loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, get_args

import anyio.to_thread
from attrs import evolve

from agentrt.cache.evict import SessionState
from agentrt.conversation import Conversation
from agentrt.errors import EngineClosed, RequestInvalid, SessionBusy
from agentrt.guards import Stop, guarded
from agentrt.observer import Observers, Scope, current_scope
from agentrt.session_store import SavedSession, SessionFile
from agentrt.structured import output_form, refuse_two_grammars
from agentrt.token_log import TokenLog, check_text
from agentrt.tools import ToolSet
from agentrt.turn import Turn, TurnRules
from agentrt.types import (
    Message,
    Reply,
    SessionEvent,
    ToolCall,
    ToolChoice,
    TurnFinished,
)

if TYPE_CHECKING:
    from agentrt.chat import Chat
    from agentrt.engine import Engine


class Session:
    """A conversation whose token log only grows, so that its KV stays valid from turn to turn.

    Made by `Engine.session`. Owns `messages` and the log. One turn runs at a time (SessionBusy).
    A turn that fails or is cancelled is taken back: the log is as it was before it. Observers know
    the session as `agent`.

    With `tool_choice="required"` a turn begins with at least one tool call; after the results the
    model is free again, so that it can answer. With "once" a turn is exactly one call and then an
    answer in text: small models call again and again if they may. With `output` the answer is a
    value of that type (see `agentrt.structured`), else text.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        *,
        system: str | None,
        tools: Sequence[Any],
        rules: TurnRules,
        saved_as: SessionFile | None = None,
    ) -> None:
        if rules.max_steps < 1:
            raise RequestInvalid(f"max_steps must be at least 1, got {rules.max_steps}")
        if chat.tokenizer is None or chat.template is None:
            raise RequestInvalid("this model has no chat template: use generate with token ids")
        self._engine = engine
        self._chat = chat
        self.tools = ToolSet(tools)
        self.rules = rules
        self._check_options()
        self._conversation = Conversation(chat, self.tools, TokenLog(chat.tokenizer))
        if system is not None:
            check_text(system)
            self.messages.append(Message(role="system", content=system))
        self._file = saved_as
        self.agent = current_scope().agent or self._observers.new_name()
        self._num_forks = 0
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Session messages={len(self.messages)} tokens={len(self._log.ids)}>"

    async def __aenter__(self) -> Self:
        if self._file is not None:
            self._file.claim()
            try:
                saved = await anyio.to_thread.run_sync(self._file.load)
                if saved is not None:
                    self._restore(saved)
            except BaseException:
                self._file.release()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._file is not None:  # its next opening goes on from here
            self._file.release()
            return
        self._engine.mark(self._log.ids, SessionState.CLOSED)

    def _restore(self, saved: SavedSession) -> None:
        """Go on from what was saved. Another model reads the messages anew."""
        assert self._file is not None
        conversation = self._conversation
        conversation.messages, conversation.num_calls = list(saved.messages), saved.num_calls
        if saved.model_digest == self._file.model_digest:
            self._log.restore(saved.ids, saved.text, saved.marks)

    async def _save(self) -> None:
        """Write the session's file, if it has one, before the caller hears that the turn ended."""
        if self._file is not None:
            saved = SavedSession(
                messages=tuple(self.messages),
                num_calls=self._conversation.num_calls,
                model_digest=self._file.model_digest,
                ids=tuple(self._log.ids),
                text=self._log.text,
                marks=self._log.marks,
            )
            await anyio.to_thread.run_sync(self._file.save, saved)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token log: all that the model has read or written, as it was."""
        return tuple(self._log.ids)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        return self._conversation.messages

    @property
    def _log(self) -> TokenLog:
        return self._conversation.log

    @property
    def _observers(self) -> Observers:
        return self._engine._open.loop.observers

    async def run(
        self, text: str, *, tool_choice: ToolChoice | None = None, output: Any = None
    ) -> Reply:
        """Send a user message and go through the whole tool loop. `tool_choice` and `output` are
        for this turn.

        Raises SessionBusy while another turn runs, OutputInvalid where the answer is not what
        `output` asks for, and what `Engine.generate` raises.
        """
        turn = self._new_turn(tool_choice, output)
        end: TurnFinished | None = None
        async with aclosing(self._turn(text, turn)) as events:
            async for event in events:
                if isinstance(event, TurnFinished):
                    end = event
        assert end is not None
        return Reply(
            text=end.text,
            finish_reason=end.finish_reason,
            steps=tuple(turn.steps),
            reason=end.reason,
            reasoning=end.reasoning,
            value=end.value,
        )

    async def stream(
        self, text: str, *, tool_choice: ToolChoice | None = None, output: Any = None
    ) -> AsyncGenerator[SessionEvent]:
        """The same, as events: TextDelta, ReasoningDelta, ToolCallStarted, ToolCallDelta,
        ToolCallArguments, ToolResult, and TurnFinished last. Leaving the iterator cancels the
        turn. Guards are asked before anything is handed out; then there are no token ids."""
        async with aclosing(self._turn(text, self._new_turn(tool_choice, output))) as events:
            async for event in events:
                yield event

    async def fork(self, num: int) -> list[Session]:
        """Sessions that go on from here on their own. No KV is copied until they differ."""
        self._refuse_busy()
        if num < 1:
            raise RequestInvalid(f"fork makes at least 1 session, got {num}")
        return [self._copy() for _ in range(num)]

    @asynccontextmanager
    async def tool_pause(self, name: str = "tool") -> AsyncGenerator[None]:
        """For callers who run their own tools: say that this session waits for one, as long as the
        block takes. Its KV may make room meanwhile and is brought back in time."""
        scope, call = Scope(self.agent), ToolCall("", name, {})
        with self._observers.tool(scope, call):
            async with self._engine.pause(self._log.ids, name):
                yield

    async def erase(self) -> None:
        """Forget the conversation, and overwrite its KV in every tier wherever no other session
        shares it. Raises TierUnavailable if another process writes the disk tier."""
        self._refuse_busy()
        self._busy = True
        try:
            if self._log.ids:
                await self._engine.forget(self._log.ids, erase=True)
            if self._file is not None:
                await anyio.to_thread.run_sync(self._file.erase)
        finally:
            self._busy = False
        assert self._chat.tokenizer is not None
        empty = TokenLog(self._chat.tokenizer)
        self._conversation = Conversation(self._chat, self.tools, empty)

    def _copy(self) -> Session:
        twin = Session(
            self._engine, self._chat, system=None, tools=tuple(self.tools), rules=self.rules
        )
        twin._conversation = self._conversation.copy()
        self._num_forks += 1
        twin.agent = f"{self.agent}.{self._num_forks}"
        return twin

    def _check_options(self) -> None:
        if self.rules.options.n != 1:
            raise RequestInvalid("n must be 1 in a session: fork it to sample several answers")
        if self.tools and self.rules.options.grammar is not None:
            raise RequestInvalid("a session with tools has a grammar of its own: leave grammar out")
        self._check_rules(self.rules)

    def _check_rules(self, rules: TurnRules) -> None:
        choice = rules.choice
        if choice not in get_args(ToolChoice):
            raise RequestInvalid(f"tool_choice is 'auto', 'required' or 'once', got {choice!r}")
        if choice != "auto" and not self.tools:
            raise RequestInvalid(f"tool_choice={choice!r} needs a session with tools")
        refuse_two_grammars(rules.options, rules.output)

    def _refuse_busy(self) -> None:
        if self._closed:
            raise EngineClosed("the session is closed: open a new one")
        if self._busy:
            raise SessionBusy("the session runs a turn already: await it, or fork the session")

    def _new_turn(self, tool_choice: ToolChoice | None, output: Any) -> Turn:
        rules = self.rules
        if tool_choice is not None:
            rules = evolve(rules, choice=tool_choice)
        if output is not None:
            rules = evolve(rules, output=output_form(output))
        self._check_rules(rules)
        scope = self._observers.new_turn(self.agent)
        return Turn(self._engine, self._conversation, rules, scope)

    async def _turn(self, text: str, turn: Turn) -> AsyncGenerator[SessionEvent]:
        self._refuse_busy()
        check_text(text)
        before = self._conversation.copy()
        self._engine.mark(self._log.ids, SessionState.RUNNING)
        self._busy, complete = True, False
        try:
            if turn.rules.input_guards:
                text, stopped = await guarded(text, turn.rules.input_guards, "user")
                if stopped is not None:
                    yield _refused(stopped)
                    return
            self.messages.append(Message(role="user", content=text))
            async with aclosing(turn.run()) as events:
                async for event in events:
                    if isinstance(event, TurnFinished):
                        await self._save()
                        complete = True
                    yield event
        except BaseException:
            if not complete:  # leaving at the last event leaves a whole turn
                self._conversation.take_back(before)
            raise
        finally:
            self._busy = False
            self._engine.mark(self._log.ids, SessionState.IDLE)


def _refused(stopped: Stop) -> TurnFinished:
    """The end of a turn whose message a guard stopped: the conversation is as it was."""
    return TurnFinished("", "guard", 0, reason=stopped.reason)
