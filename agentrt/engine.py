"""Engine: opens and closes everything, and hands requests to the step thread."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, closing
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

import anyio.to_thread
import numpy as np
from attrs import evolve

from agentrt.config import EngineConfig, ResolvedConfig
from agentrt.errors import EngineClosed, RequestInvalid
from agentrt.explain import MAX_ADMISSIONS, Explanation, explain
from agentrt.guards import Guard, guarded_completion, guarded_prompt, guarded_stream
from agentrt.metrics import Stats
from agentrt.output import OutputText
from agentrt.request import Request, check_options
from agentrt.session import Session
from agentrt.session_store import SessionFile, SessionStore
from agentrt.step_thread import open_on_step_thread
from agentrt.stream import TokenStream
from agentrt.structured import output_form
from agentrt.submission import admissible_tokens, held_to, packed, samples
from agentrt.tool_runs import APPROVE_TIMEOUT_S, Approval, Approve
from agentrt.turn import TurnRules
from agentrt.types import Completion, GenerateOptions, StreamEvent, ToolChoice

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from openai import AsyncOpenAI

    from agentrt.cache import SessionState
    from agentrt.chat import Chat, Prompt
    from agentrt.engine_parts import EngineParts
    from agentrt.grammar import Constraint
    from agentrt.tokenizer import Tokenizer

SESSIONS_FOLDER = "sessions"


class Engine:
    """A model, its KV cache and its step thread, inside this process.

    Use it as an async context manager. Leaving it cancels what still runs and gives all memory
    back. Methods may be called from any task of the event loop that opened it.

    `model` is a folder in Hugging Face layout, a .gguf file, a registered name or org/name on a
    hub. `progress(stage, done, total)` is called from a worker thread while loading. Guards see
    every prompt and every output before anyone else does (see `agentrt.guards`).
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        config: EngineConfig | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        output_guards: Sequence[Guard] = (),
        input_guards: Sequence[Guard] = (),
    ) -> None:
        self.output_guards, self.input_guards = tuple(output_guards), tuple(input_guards)
        self.model = os.fspath(model)
        self.config = config or EngineConfig()
        self._progress = progress
        self._parts: EngineParts | None = None
        self._numbers = itertools.count()
        self._open_sessions: set[str] = set()

    def __repr__(self) -> str:
        if self._parts is None:
            return f"<Engine {self.model!r} closed>"
        stats = self.stats()
        return f"<Engine {self.model!r} running={stats.running} waiting={stats.waiting}>"

    async def __aenter__(self) -> Self:
        if self._parts is not None:
            raise RequestInvalid("this engine is open already")
        event_loop, abandoned = asyncio.get_running_loop(), threading.Event()
        opening = open_on_step_thread(lambda: self._open_parts(event_loop, abandoned))
        try:
            self._parts = await asyncio.wrap_future(opening)
        except BaseException:
            abandoned.set()  # a load that still goes on in its thread frees what it made
            opening.add_done_callback(_close_parts)
            raise
        return self

    def _open_parts(
        self, event_loop: asyncio.AbstractEventLoop, abandoned: threading.Event
    ) -> EngineParts:
        """Runs on the step thread. Tests override it, to put a fake device below."""
        from agentrt.engine_parts import open_parts  # loads torch: not at import of agentrt

        return open_parts(self.model, self.config, self._progress, event_loop, abandoned)

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what runs, end the step thread, free all memory. May be called twice."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.loop.close()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(parts.loop.join)

    # ---- generation

    async def generate(
        self, prompt: Prompt, options: GenerateOptions | None = None, *, output: Any = None
    ) -> Completion:
        """Generate to the end. Text prompts are encoded as text: no template, no special tokens.

        With `options.n > 1` the further samples are in `completion.others`; where a seed is set,
        sample i uses `seed + i`. With `output` the text is held to that type, and the value is
        `completion.value` (see `agentrt.structured`).

        Raises RequestInvalid, PromptTooLong, Overloaded, EngineClosed, EngineFailed, OutputInvalid
        where the output is not what `output` asks for, or GuardStopped.
        """
        options, form = held_to(options or GenerateOptions(), output)
        if self.input_guards:
            prompt = await self._guarded_prompt(prompt)
        ids = await self._open.chat.prompt_ids(packed(prompt))
        streams: list[TokenStream] = []
        try:
            for one in samples(options):
                stream = await self.submit(ids, one)
                streams.append(stream)
            done = [await stream.collect() for stream in streams]
        finally:
            for stream in streams:
                stream.close()
        if self.output_guards:
            done = [await guarded_completion(each, self.output_guards) for each in done]
        if form is not None:
            done = [evolve(each, value=form.value(each.text)) for each in done]
        first, *others = done
        return evolve(first, others=tuple(others)) if others else first

    def stream(
        self, prompt: Prompt, options: GenerateOptions | None = None
    ) -> AsyncGenerator[StreamEvent]:
        """TextDelta events as tokens come, then Finished. Leaving the iterator cancels. Raises as
        `generate` does; `options.n` must be 1. With output guards there are no token ids."""
        if self.input_guards or self.output_guards:
            return self._guarded_stream(prompt, options)
        return self.raw_stream(prompt, options)

    async def _guarded_stream(
        self, prompt: Prompt, options: GenerateOptions | None
    ) -> AsyncGenerator[StreamEvent]:
        raw = self.raw_stream(await self._guarded_prompt(prompt), options)
        events = guarded_stream(raw, self.output_guards) if self.output_guards else raw
        async with aclosing(raw), aclosing(events):
            async for event in events:
                yield event

    async def _guarded_prompt(self, prompt: Prompt) -> Prompt:
        text = prompt if isinstance(prompt, str) else self._open.chat.decode(prompt)
        shown = await guarded_prompt(text, self.input_guards)
        return prompt if shown == text else shown

    async def raw_stream(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        is_rewritten: bool = False,
    ) -> AsyncGenerator[StreamEvent]:
        """`stream` without guards, for sessions, which ask them themselves. `is_rewritten` says
        that the prompt rewrites what an earlier one had: `explain` tells so."""
        options = options or GenerateOptions()
        if options.n != 1:
            raise RequestInvalid("n must be 1 for stream: call it once a sample")
        ids = await self._open.chat.prompt_ids(packed(prompt))
        stream = await self.submit(ids, options, is_rewritten=is_rewritten)
        with closing(stream):
            async for event in stream:
                yield event

    async def prefill(self, token_ids: Sequence[int]) -> None:
        """Compute a prompt's KV ahead of the request that will have it. Raises as `generate`."""
        ids = await self._open.chat.prompt_ids(packed(token_ids))
        stream = await self.submit(ids, None)
        with closing(stream):
            await stream.collect()

    def session(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Any] = (),
        options: GenerateOptions | None = None,
        max_steps: int = 16,
        tool_choice: ToolChoice = "auto",
        output: Any = None,
        approve: Approve | None = None,
        approve_timeout_s: float = APPROVE_TIMEOUT_S,
        output_guards: Sequence[Guard] = (),
        input_guards: Sequence[Guard] = (),
        id: str | None = None,
    ) -> Session:
        """A conversation with tools; use it as an async context manager (see Session).

        `approve(call)` is awaited before a call runs: True lets it, a ToolCall runs in its place;
        False, a text that the model reads, or no answer in time forbids it. The engine's guards
        are asked before the session's.

        One with an `id` is saved after each turn: opened again, also after a restart, it goes on
        where it was, and its KV comes from the tiers. Its messages are then the saved ones, not
        `system`. Raises SessionBusy, when entered, if it is open in this engine already.
        """
        approval = None if approve is None else Approval(approve, approve_timeout_s)
        saved_as = None
        if id is not None:
            store = SessionStore(self.config.cache_dir / SESSIONS_FOLDER, self.config.namespace)
            saved_as = SessionFile(
                store, id, self._open.fingerprint.model_digest, self._open_sessions
            )
        return Session(
            self,
            self._open.chat,
            system=system,
            tools=tools,
            rules=TurnRules(
                options=options or GenerateOptions(),
                choice=tool_choice,
                max_steps=max_steps,
                output=None if output is None else output_form(output),
                approval=approval,
                output_guards=(*self.output_guards, *output_guards),
                input_guards=(*self.input_guards, *input_guards),
            ),
            saved_as=saved_as,
        )

    async def forget(
        self, token_ids: Sequence[int], *, keep_tokens: int = 0, erase: bool = False
    ) -> int:
        """Drop this prefix's KV beyond `keep_tokens` from every tier, where nobody else uses it.
        Returns the tokens dropped from the device.

        With `erase` the bytes in host RAM and on disk are overwritten before this returns. Raises
        TierUnavailable if another process writes the disk tier.
        """
        ids = np.asarray(packed(token_ids), dtype=np.int32)
        scheduler = self._open.loop.scheduler

        def drop() -> int:
            mover = scheduler.mover
            if mover is not None:
                mover.tiers.forget(ids, keep_tokens, erase=erase)
            if erase and scheduler.drafter is not None:
                scheduler.drafter.forget(self.config.namespace)
            return scheduler.cache.forget(
                ids, keep_tokens=keep_tokens, namespace=self.config.namespace
            )

        # What a turn has just left may still be on its way into the tiers.
        dropped = await asyncio.wrap_future(self._open.loop.call_after_transfers(drop))
        if erase and scheduler.mover is not None:
            await anyio.to_thread.run_sync(scheduler.mover.tiers.wait_until_erased)
        return dropped

    @asynccontextmanager
    async def pause(self, token_ids: Sequence[int], name: str) -> AsyncGenerator[None]:
        """Say that whoever owns the log `token_ids` waits for a tool, which takes as long as the
        block. Its KV may make room meanwhile, and is brought back when tools of that name usually
        end (`Session.tool_pause` does this for a session)."""
        loop, number = self._open.loop, next(self._numbers)
        ids = np.asarray(packed(token_ids), np.int32)
        pauses = loop.scheduler.pauses
        loop.tell(lambda: pauses.begin(number, ids, name, loop.clock()))
        try:
            yield
        finally:
            loop.tell(lambda: pauses.end(number, loop.clock()))

    def mark(self, token_ids: Sequence[int], state: SessionState) -> None:
        """Tell eviction what whoever owns the log `token_ids` does. Never waits."""
        if self._parts is None:
            return
        loop, ids = self._parts.loop, np.asarray(packed(token_ids), np.int32)
        loop.tell(lambda: loop.scheduler.pauses.mark(ids, state, loop.clock()))

    def openai(self, **settings: Any) -> AsyncOpenAI:
        """A ready `openai.AsyncOpenAI` that this engine answers, without a port. `settings` are the
        client's own. Raises MissingExtra without the extra `openai`."""
        adapter = import_module("agentrt.adapters.openai")  # above us: loaded only when asked for
        client: AsyncOpenAI = adapter.client(self, **settings)
        return client

    # ---- state

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestInvalid where the model has none."""
        return self._open.chat.needed_tokenizer

    @property
    def text(self) -> Chat:
        """The text side of the model: tokenizer, chat template and grammars."""
        return self._open.chat

    @property
    def resolved(self) -> ResolvedConfig:
        """The numbers that this engine runs with."""
        return self._open.loop.scheduler.config

    def stats(self) -> Stats:
        """A snapshot of the counters. Never waits."""
        return self._open.stats()

    async def explain(self, request_id: str) -> Explanation:
        """Where the prefix of a recent request matched, in which tier, the first token that
        differed, and why. Raises RequestInvalid for an id that is unknown or long gone."""
        parts = self._open
        admissions = parts.loop.scheduler.admissions
        admission = await asyncio.wrap_future(parts.loop.call(lambda: admissions.get(request_id)))
        if admission is None:
            why = f"was never admitted, or is not among the last {MAX_ADMISSIONS}"
            raise RequestInvalid(f"request {request_id!r} {why}")
        elsewhere = parts.elsewhere(admission.token_ids)
        return explain(request_id, admission, parts.chat.decode, elsewhere)

    async def check(self) -> None:
        """Verify every invariant of scheduler and cache, between two steps. Raises CacheCorrupt."""
        await asyncio.wrap_future(self._open.loop.call(self._open.loop.scheduler.check))

    @property
    def _open(self) -> EngineParts:
        if self._parts is None:
            raise EngineClosed("the engine is not open: use `async with Engine(...) as engine`")
        return self._parts

    # ---- submission

    async def submit(
        self, ids: NDArray[np.int32], options: GenerateOptions | None, *, is_rewritten: bool = False
    ) -> TokenStream:
        """`raw_stream` of checked ids, which has raised what it raises by now. Close the stream."""
        parts, num_unwanted = self._open, int(options is None)  # without: the prompt's KV alone
        options = options or GenerateOptions(max_tokens=1)
        check_options(options, parts.spec.vocab_size)
        total_tokens = admissible_tokens(
            len(ids), options, self.resolved, num_queued=parts.loop.num_queued
        )
        constraint = await parts.chat.constraint(options, total_tokens - len(ids))
        if self._parts is None:
            raise EngineClosed("the engine was closed while the request was prepared")
        total_tokens -= num_unwanted
        request, stream = self._request(parts, ids, total_tokens, options, constraint)
        request.is_rewritten = is_rewritten
        parts.loop.submit(request)
        return stream

    def _request(
        self,
        parts: EngineParts,
        ids: NDArray[np.int32],
        total_tokens: int,
        options: GenerateOptions,
        constraint: Constraint | None,
    ) -> tuple[Request, TokenStream]:
        chat, loop = parts.chat, parts.loop
        request_id = f"r{next(self._numbers)}"
        stream = TokenStream(lambda: loop.cancel(request_id))
        tokens = np.zeros(total_tokens, dtype=np.int32)
        tokens[: len(ids)] = ids
        request = Request(
            id=request_id,
            options=options,
            namespace=self.config.namespace,
            sink=stream.deliver,
            text=OutputText(chat.decoder(), options.stop),
            tokens=tokens,
            num_prompt_tokens=len(ids),
            eos_token_ids=chat.eos_token_ids,
            constraint=constraint,
            submitted_s=time.monotonic(),
        )
        return request, stream


def _close_parts(opening: Future[EngineParts]) -> None:
    """Close what an abandoned opening made, if it made anything."""
    if opening.exception() is None:
        opening.result().loop.close()
