"""Session: one conversation, token-exact, with the whole tool loop."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, get_args

import anyio
import anyio.to_thread
from attrs import evolve

from agentrt.cache.evict import SessionState
from agentrt.errors import EngineClosed, RequestInvalid, SessionBusy
from agentrt.grammar_calls import text_without_calls
from agentrt.grammar_calls import tool_calls as tool_call_grammar
from agentrt.session_store import SavedSession, SessionFile
from agentrt.token_log import INLINE_CHARACTERS, TokenLog, check_text
from agentrt.tools import ToolSet, run_tool
from agentrt.types import (
    Completion,
    Finished,
    GenerateOptions,
    Message,
    Reply,
    SessionEvent,
    Step,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolChoice,
    ToolResult,
    TurnFinished,
    TurnReason,
)

if TYPE_CHECKING:
    from agentrt.chat import Chat
    from agentrt.engine import Engine


class Session:
    """A conversation whose token log only grows, so that its KV stays valid from turn to turn.

    Made by `Engine.session`. Owns `messages` and the log. One turn runs at a time (SessionBusy).
    A turn that fails or is cancelled is taken back: the log is as it was before it.

    With `tool_choice="required"` a turn begins with at least one tool call; after the results the
    model is free again, so that it can answer. With "once" a turn is exactly one call and then an
    answer in text: small models call again and again if they may.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        *,
        system: str | None,
        tools: Sequence[Any],
        options: GenerateOptions | None,
        max_steps: int,
        tool_choice: ToolChoice,
        saved_as: SessionFile | None = None,
    ) -> None:
        if max_steps < 1:
            raise RequestInvalid(f"max_steps must be at least 1, got {max_steps}")
        if chat.tokenizer is None or chat.template is None:
            raise RequestInvalid("this model has no chat template: use generate with token ids")
        self._engine = engine
        self._chat = chat
        self.tools = ToolSet(tools)
        self.max_steps = max_steps
        self.options = options or GenerateOptions()
        self.tool_choice = tool_choice
        self._check_options()
        self.messages: list[Message] = []
        if system is not None:
            check_text(system)
            self.messages.append(Message(role="system", content=system))
        self._log = TokenLog(chat.tokenizer)
        self._file = saved_as
        self._num_calls = 0
        self._rewrites_seen = 0
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
        self.messages, self._num_calls = list(saved.messages), saved.num_calls
        if saved.model_digest == self._file.model_digest:
            self._log.restore(saved.ids, saved.text, saved.marks)

    async def _save(self) -> None:
        """Write the session's file, if it has one, before the caller hears that the turn ended."""
        if self._file is not None:
            saved = SavedSession(
                messages=tuple(self.messages),
                num_calls=self._num_calls,
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

    async def run(self, text: str, *, tool_choice: ToolChoice | None = None) -> Reply:
        """Send a user message and go through the whole tool loop. `tool_choice` is for this turn.

        Raises SessionBusy while another turn runs, and what `Engine.generate` raises.
        """
        steps: list[Step] = []
        end: TurnFinished | None = None
        async for event in self._turn(text, steps, tool_choice):
            if isinstance(event, TurnFinished):
                end = event
        assert end is not None
        return Reply(text=end.text, finish_reason=end.finish_reason, steps=tuple(steps))

    async def stream(
        self, text: str, *, tool_choice: ToolChoice | None = None
    ) -> AsyncGenerator[SessionEvent]:
        """The same, as events: TextDelta, ToolCallStarted, ToolCallArguments, ToolResult, and
        TurnFinished last. Leaving the iterator cancels the turn."""
        async with aclosing(self._turn(text, [], tool_choice)) as events:
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
        self.messages.clear()
        assert self._chat.tokenizer is not None
        self._log = TokenLog(self._chat.tokenizer)

    def _copy(self) -> Session:
        twin = Session(
            self._engine,
            self._chat,
            system=None,
            tools=tuple(self.tools),
            options=self.options,
            max_steps=self.max_steps,
            tool_choice=self.tool_choice,
        )
        twin.messages = list(self.messages)
        twin._log = self._log.copy()
        twin._num_calls = self._num_calls
        return twin

    def _check_options(self) -> None:
        if self.options.n != 1:
            raise RequestInvalid("n must be 1 in a session: fork it to sample several answers")
        if self.tools and self.options.grammar is not None:
            raise RequestInvalid("a session with tools has a grammar of its own: leave grammar out")
        self._check_choice(self.tool_choice)

    def _check_choice(self, choice: ToolChoice) -> None:
        if choice not in get_args(ToolChoice):
            raise RequestInvalid(f"tool_choice is 'auto', 'required' or 'once', got {choice!r}")
        if choice != "auto" and not self.tools:
            raise RequestInvalid(f"tool_choice={choice!r} needs a session with tools")

    def _step_options(self, choice: ToolChoice, *, first: bool) -> GenerateOptions:
        """The options of one generation: with tools, the grammar of one that may or must call."""
        if not self.tools:
            return self.options
        chat, form = self._chat, self._chat.call_format
        if choice == "once" and not first:
            shape = chat.turn_shape(self._log.text)
            return evolve(self.options, grammar=text_without_calls(form, shape))
        required, parallel = first and choice != "auto", choice != "once"
        shape = chat.turn_shape(self._log.text, required=required, parallel=parallel)
        grammar = tool_call_grammar(self.tools, form, shape)
        return evolve(self.options, grammar=grammar)

    def _refuse_busy(self) -> None:
        if self._closed:
            raise EngineClosed("the session is closed: open a new one")
        if self._busy:
            raise SessionBusy("the session runs a turn already: await it, or fork the session")

    async def _turn(
        self, text: str, steps: list[Step], tool_choice: ToolChoice | None
    ) -> AsyncGenerator[SessionEvent]:
        self._refuse_busy()
        choice = self.tool_choice if tool_choice is None else tool_choice
        self._check_choice(choice)
        check_text(text)
        before = list(self.messages), self._log.copy(), self._num_calls
        self._engine.mark(self._log.ids, SessionState.RUNNING)
        self._busy, complete = True, False
        try:
            self.messages.append(Message(role="user", content=text))
            async with aclosing(self._steps(steps, choice)) as events:
                async for event in events:
                    if isinstance(event, TurnFinished):
                        await self._save()
                        complete = True
                    yield event
        except BaseException:
            if not complete:  # leaving at the last event leaves a whole turn
                self.messages, self._log, self._num_calls = before
            raise
        finally:
            self._busy = False
            self._engine.mark(self._log.ids, SessionState.IDLE)

    async def _steps(self, steps: list[Step], choice: ToolChoice) -> AsyncGenerator[SessionEvent]:
        """Generate, run the tools that were called, and again, until no tool is called."""
        while True:
            await self._render()
            calls: list[ToolCall] = []
            completion: Completion | None = None
            options = self._step_options(choice, first=not steps)
            async with aclosing(self._generate(options)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        completion = event.completion
                        continue
                    if isinstance(event, ToolCallArguments):
                        calls.append(event.call)
                    yield event
            assert completion is not None
            self._note(completion, len(calls))
            results = await self._run_tools(calls)
            for result in results:
                yield result
            steps.append(Step(completion=completion, results=results))
            if not calls or len(steps) >= self.max_steps:
                yield TurnFinished(completion.text, _reason(completion, calls), len(steps))
                return

    async def _render(self) -> None:
        """Bring the log up to the messages; long new text is encoded in a worker thread."""
        rendered, log = self._chat.render(self.messages, self.tools), self._log
        if len(rendered) - len(log.text) <= INLINE_CHARACTERS:
            log.update(rendered)
        else:
            await anyio.to_thread.run_sync(log.update, rendered)

    async def _generate(self, options: GenerateOptions) -> AsyncGenerator[SessionEvent | Finished]:
        """One generation: its text without tool calls, its tool calls, and Finished last."""
        scanner = self._chat.parser(self._log.text, self.tools, self._num_calls)
        rewrites, self._rewrites_seen = self._log.rewrites - self._rewrites_seen, self._log.rewrites
        stream = self._engine.stream(tuple(self._log.ids), options, is_rewritten=rewrites > 0)
        async with aclosing(stream) as events:
            async for event in events:
                last = isinstance(event, Finished)
                ids = () if isinstance(event, Finished) else event.token_ids
                text = "" if isinstance(event, Finished) else event.text
                for part in scanner.flush() if last else scanner.push(text):
                    yield TextDelta(part, ids) if isinstance(part, str) else part
                if last:
                    yield event

    def _note(self, completion: Completion, num_calls: int) -> None:
        """Append what was generated: ids as they are, text as the template will show it."""
        self.messages.append(Message(role="assistant", content=completion.text))
        last = completion.token_ids[-1] if completion.token_ids else None
        ended = last if last in self._chat.eos_token_ids else None
        self._log.append_generated(completion.token_ids, self._chat.shown(completion.text, ended))
        self._num_calls += num_calls

    async def _run_tools(self, calls: Sequence[ToolCall]) -> tuple[ToolResult, ...]:
        """Run the calls concurrently; results and their messages are in the order of the calls."""
        results: dict[str, ToolResult] = {}

        async def run(call: ToolCall) -> None:
            async with self.tool_pause(call.name):
                results[call.id] = await run_tool(self.tools, call, clock=time.monotonic)

        async with anyio.create_task_group() as group:
            for call in calls:
                group.start_soon(run, call)
        ordered = tuple(results[call.id] for call in calls)
        for result in ordered:
            name, call_id = result.call.name, result.call.id
            self.messages.append(
                Message(role="tool", content=result.content, name=name, tool_call_id=call_id)
            )
        return ordered


def _reason(completion: Completion, calls: Sequence[ToolCall]) -> TurnReason:
    if calls:
        return "max_steps"
    return "length" if completion.finish_reason == "length" else "stop"
