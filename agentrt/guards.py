"""Guards: async functions that see text before anyone else does, and decide what becomes of it.

A guard is an async callable that takes a GuardView and returns a verdict. It is asked again as text
comes; nothing of the view's window has been shown to anyone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Literal

from attrs import define, evolve, field, frozen

from agentrt.errors import GuardStopped, RequestInvalid
from agentrt.types import Completion, Finished, StreamEvent, TextDelta

Source = Literal["prompt", "user", "tool", "answer", "reasoning", "call"]


@frozen(kw_only=True)
class GuardView:
    """What a guard decides about: `text[start:]`. What comes before was decided already.

    `is_final` says that no more text comes. `source` is whose text it is: a prompt of
    `Engine.generate`, a user's message, a tool's result, or the model's answer, reasoning, or call
    (as JSON, whole).
    """

    text: str = field(repr=False)
    start: int
    is_final: bool
    source: Source

    @property
    def window(self) -> str:
        """The text that was not decided yet."""
        return self.text[self.start :]


@frozen
class Pass:
    """The window may go, but for `keep_characters` at its end, which wait for more text."""

    keep_characters: int = 0


@frozen
class Span:
    """Characters [start, end) of the view's text, and what stands there instead."""

    start: int
    end: int
    text: str


def _as_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(spans)


@frozen
class Redact:
    """The window may go with these spans changed. What is kept waits, a cut span with it."""

    spans: tuple[Span, ...] = field(converter=_as_spans)
    keep_characters: int = 0


@frozen
class Replace:
    """Something else goes instead of the window."""

    text: str


@frozen
class Stop:
    """Nothing of the window goes, and the turn or request ends here."""

    reason: str


Verdict = Pass | Redact | Replace | Stop
Guard = Callable[[GuardView], Awaitable[Verdict]]


@define(eq=False)
class _Stage:
    """One guard and the text that came to it. Invariant: what is before `start` is decided."""

    guard: Guard
    source: Source
    text: str = ""
    start: int = 0

    async def push(self, new: str, *, is_final: bool) -> str | Stop:
        self.text += new
        if self.start == len(self.text):
            return ""
        view = GuardView(text=self.text, start=self.start, is_final=is_final, source=self.source)
        verdict = await self.guard(view)
        if isinstance(verdict, Stop):
            return verdict
        end = len(self.text)
        if isinstance(verdict, Replace):
            self.start = end
            return verdict.text
        if not isinstance(verdict, Pass | Redact):
            raise RequestInvalid(
                f"guard {self.guard!r} returned {verdict!r}: return Pass, Redact, Replace or Stop"
            )
        if not is_final:
            end = max(self.start, end - max(0, verdict.keep_characters))
        return self._redacted(verdict.spans if isinstance(verdict, Redact) else (), end)

    def _redacted(self, spans: Sequence[Span], end: int) -> str:
        pieces = []
        for span in sorted(spans, key=lambda span: span.start):
            if not self.start <= span.start <= span.end <= len(self.text):
                raise RequestInvalid(
                    f"guard {self.guard!r} redacts {span}, which overlaps another one or is outside"
                    f" of [{self.start}, {len(self.text)})"
                )
            if span.end > end:
                end = min(end, span.start)
                break
            pieces += [self.text[self.start : span.start], span.text]
            self.start = span.end
        pieces.append(self.text[self.start : end])
        self.start = end
        return "".join(pieces)


class GuardedText:
    """One text on its way through a chain of guards, in order: each sees what the one before lets
    through. `stopped` says which verdict ended it."""

    # State: the stages; raw and shown, all that came in and went out. After a Stop nothing goes.

    def __init__(self, guards: Sequence[Guard], source: Source) -> None:
        self._stages = [_Stage(guard, source) for guard in guards]
        self.raw = self.shown = ""
        self.stopped: Stop | None = None

    @property
    def is_changed(self) -> bool:
        """Whether something else went out than came in."""
        return self.raw != self.shown

    async def push(self, text: str, *, is_final: bool = False) -> str:
        """Take the next text, and return what may be shown now."""
        self.raw += text
        for stage in self._stages:
            if self.stopped is not None:
                return ""
            out = await stage.push(text, is_final=is_final)
            if isinstance(out, Stop):
                self.stopped = out
                return ""
            text = out
        self.shown += text
        return text

    async def finish(self) -> str:
        """The rest, when no more text comes."""
        return await self.push("", is_final=True)


async def guarded(text: str, guards: Sequence[Guard], source: Source) -> tuple[str, Stop | None]:
    """A whole text, as the guards let it through."""
    passing = GuardedText(guards, source)
    shown = await passing.push(text, is_final=True)
    return shown, passing.stopped


async def guarded_prompt(text: str, guards: Sequence[Guard]) -> str:
    """A prompt, as the guards let it through. Raises GuardStopped."""
    shown, stopped = await guarded(text, guards, "prompt")
    if stopped is not None:
        raise GuardStopped(f"a guard stopped the prompt: {stopped.reason}")
    return shown


async def guarded_completion(completion: Completion, guards: Sequence[Guard]) -> Completion:
    """A completion, as the guards let its text through. Raises GuardStopped."""
    shown, stopped = await guarded(completion.text, guards, "answer")
    if stopped is not None:
        raise GuardStopped(f"a guard stopped the output: {stopped.reason}")
    return _changed(completion, shown)


def _changed(completion: Completion, shown: str) -> Completion:
    if shown == completion.text:
        return completion
    return evolve(completion, text=shown, token_ids=(), logprobs=None)


async def guarded_stream(
    events: AsyncGenerator[StreamEvent], guards: Sequence[Guard]
) -> AsyncGenerator[StreamEvent]:
    """An engine's events, as the guards let them through: without token ids, which tell the text.

    Raises GuardStopped, when what was let through before has been handed out.
    """
    passing = GuardedText(guards, "answer")
    async for event in events:
        if isinstance(event, Finished):
            text = await passing.finish()
        else:
            text = await passing.push(event.text)
        if text:
            yield TextDelta(text, ())
        if passing.stopped is not None:
            raise GuardStopped(f"a guard stopped the output: {passing.stopped.reason}")
        if isinstance(event, Finished):
            yield Finished(_changed(event.completion, passing.shown))
