"""One turn of a session: generate, run the tools that were called, and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
from attrs import define, evolve, field, frozen

from agentrt.grammar_calls import TurnShape, text_without_calls, thinking_then, tool_calls
from agentrt.guards import Guard, Stop, guarded
from agentrt.observer import Observers, Scope, scoped
from agentrt.screen import Screen
from agentrt.structured import OutputForm
from agentrt.tool_prefill import ToolPrefill
from agentrt.tool_runs import Approval, ToolRuns
from agentrt.types import (
    Completion,
    Finished,
    GenerateOptions,
    ReasoningDelta,
    SessionEvent,
    Step,
    TextDelta,
    ToolCallArguments,
    ToolChoice,
    ToolResult,
    TurnFinished,
    TurnReason,
)

if TYPE_CHECKING:
    from agentrt.conversation import Conversation
    from agentrt.engine import Engine


@frozen(kw_only=True)
class TurnRules:
    """What a turn is held to: a session's settings, and those of one call of `run`."""

    options: GenerateOptions
    choice: ToolChoice
    max_steps: int
    output: OutputForm | None = None
    approval: Approval | None = None
    output_guards: tuple[Guard, ...] = ()
    input_guards: tuple[Guard, ...] = ()


@define(eq=False)
class Turn:
    """Adds to the conversation. Events come from `run`; `steps` are those that were completed."""

    engine: Engine
    conversation: Conversation
    rules: TurnRules
    scope: Scope
    steps: list[Step] = field(factory=list, init=False)
    _reasoning: str = field(default="", init=False)
    _text: str = field(default="", init=False)  # of the step that runs, without calls
    _completion: Completion | None = field(default=None, init=False)
    _stopped: Stop | None = field(default=None, init=False)

    async def run(self) -> AsyncGenerator[SessionEvent]:
        """Steps until no tool is called; TurnFinished last."""
        with self._observers.turn(self.scope):
            while True:
                await self.conversation.render()
                options = self.step_options(first=not self.steps)
                async with aclosing(self._step(options)) as events:
                    async for event in events:
                        yield event
                has_calls = bool(self.steps and self.steps[-1].results)
                is_over = self._stopped is not None or not has_calls
                if is_over or len(self.steps) >= self.rules.max_steps:
                    break
        yield self._end(has_calls)

    @property
    def _observers(self) -> Observers:
        return self.engine._open.loop.observers

    def step_options(self, *, first: bool) -> GenerateOptions:
        """The options of one generation: those of the session, with the grammar of the step."""
        rules, chat, tools = self.rules, self.conversation.chat, self.conversation.tools
        answer = None if rules.output is None else rules.output.rule
        if not tools and answer is None:
            return rules.options
        required = first and rules.choice != "auto"
        shape: TurnShape = chat.turn_shape(
            self.conversation.log.text,
            required=required,
            parallel=rules.choice != "once",
            answer=answer,
        )
        if not tools:
            assert answer is not None
            grammar = thinking_then(answer, shape.thinking, shape.special)
        elif rules.choice == "once" and not first:
            grammar = text_without_calls(chat.call_format, shape)
        else:
            grammar = tool_calls(tools, chat.call_format, shape)
        return evolve(rules.options, grammar=grammar)

    async def _step(self, options: GenerateOptions) -> AsyncGenerator[SessionEvent]:
        """One generation and the tools that it calls. A tool may start before it ends."""
        self._text, self._completion = "", None
        screen = Screen(self.rules.output_guards) if self.rules.output_guards else None
        runs = ToolRuns(
            self.conversation.tools,
            self.rules.approval,
            observers=self._observers,
            scope=self.scope,
        )
        try:
            async with aclosing(self._generate(options, screen)) as events:
                async for event in events:
                    if isinstance(event, ToolCallArguments):
                        runs.start(event.call)
                    yield event
            if self._stopped is not None:  # what was shown stays, its calls do not
                self.conversation.add_stopped(self._text)
                return
            self._note(runs, screen)
            runs.release()
            async with aclosing(self._results(runs)) as results:
                async for result in results:
                    yield result
        finally:
            await runs.aclose()

    async def _generate(
        self, options: GenerateOptions, screen: Screen | None
    ) -> AsyncGenerator[SessionEvent]:
        """The events of one generation. Leaves its completion behind, or a guard's verdict."""
        conversation = self.conversation
        log = conversation.log
        parser = conversation.chat.parser(log.text, conversation.tools, conversation.num_calls)
        is_rewritten = conversation.take_rewrites() > 0
        stream = self.engine.raw_stream(tuple(log.ids), options, is_rewritten=is_rewritten)
        async with aclosing(stream), aclosing(scoped(self.scope, stream)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._completion, parts = event.completion, parser.flush()
                else:
                    parts = parser.push(event.text)
                ids = () if isinstance(event, Finished) else event.token_ids
                shown: list[SessionEvent] = [
                    TextDelta(part, ids) if isinstance(part, str) else part for part in parts
                ]
                if screen is not None:
                    shown = await screen.push(shown, is_last=self._completion is not None)
                    self._stopped = screen.stopped
                for part in shown:
                    if isinstance(part, TextDelta):
                        self._text += part.text
                    elif isinstance(part, ReasoningDelta):
                        self._reasoning += part.text
                    yield part
                if self._stopped is not None:
                    return

    def _note(self, runs: ToolRuns, screen: Screen | None) -> None:
        assert self._completion is not None
        content = None
        if screen is not None and screen.is_changed:
            content = screen.content(self.conversation.chat.call_format.render)
            self._completion = evolve(self._completion, text=content, token_ids=(), logprobs=None)
        self.conversation.note(self._completion, self._text, runs.calls, content=content)

    async def _results(self, runs: ToolRuns) -> AsyncGenerator[ToolResult]:
        """The results in the order of the calls, each as soon as it is there."""
        results: list[ToolResult] = []
        prefilling = self._prefilling(runs)
        waits = [asyncio.create_task(self._paused(task, runs.calls[index].name))
                 for index, task in enumerate(runs.tasks) if not task.done()]  # fmt: skip
        try:
            for task in runs.tasks:
                await asyncio.wait([task])
                results.append(await self._guarded_result(task.result()))
                yield results[-1]
                if self._stopped is not None:
                    break
        finally:
            await _cancelled([*waits, *([] if prefilling is None else [prefilling])])
        results += [  # a guard stopped the turn, and yet each call needs a result
            ToolResult(call, "Error: not run: the turn was stopped", True, 0.0)
            for call in runs.calls[len(results) :]
        ]
        for result in results:
            self.conversation.add_result(result)
        assert self._completion is not None
        self.steps.append(Step(completion=self._completion, results=tuple(results)))

    async def _paused(self, task: asyncio.Task[Any], name: str) -> None:
        """While a tool outlasts its generation, the session's KV may make room."""
        async with self.engine.pause(self.conversation.log.ids, name):
            await asyncio.wait([task])

    def _prefilling(self, runs: ToolRuns) -> asyncio.Task[None] | None:
        """A task for the output of tools that stream. Guards see results whole, so then none."""
        tools = [self.conversation.tools.get(call.name) for call in runs.calls]
        if self.rules.input_guards or not any(tool is not None and tool.streams for tool in tools):
            return None
        prefill = ToolPrefill(self.conversation, runs, self.engine.prefill)
        runs.grown = prefill.grown
        prefill.grown()
        return asyncio.create_task(prefill.run())

    async def _guarded_result(self, result: ToolResult) -> ToolResult:
        if not self.rules.input_guards:
            return result
        text, self._stopped = await guarded(result.content, self.rules.input_guards, "tool")
        if self._stopped is None:
            return evolve(result, content=text)
        withheld = f"Error: the result was withheld: {self._stopped.reason}"
        return evolve(result, content=withheld, is_error=True)

    def _end(self, has_calls: bool) -> TurnFinished:
        reason: TurnReason = "stop"
        completion = self._completion
        if self._stopped is not None:
            reason = "guard"
        elif has_calls:
            reason = "max_steps"
        elif completion is not None and completion.finish_reason == "length":
            reason = "length"
        value = None
        if self.rules.output is not None and reason in ("stop", "length"):
            value = self.rules.output.value(self._text)
        return TurnFinished(
            self._text,
            reason,
            len(self.steps),
            reason="" if self._stopped is None else self._stopped.reason,
            reasoning=self._reasoning,
            value=value,
        )


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """End the tasks, and wait until they have ended. What failed in one of them is told."""
    for task in tasks:
        task.cancel()
    with anyio.CancelScope(shield=True):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
