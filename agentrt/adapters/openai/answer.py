"""An answer to one request: a status, headers, and a body that is whole or comes as events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

from attrs import define, field, frozen

from agentrt.adapters.openai.refusal import Refusal, refusal_of
from agentrt.errors import AgentrtError

if TYPE_CHECKING:
    from agentrt.adapters.openai.asking import Asked, Asking
    from agentrt.adapters.openai.choices import Batch
    from agentrt.adapters.openai.telling import Telling

# JSON leaves these as they are. Events end with a line, and Python's splitlines takes each for one.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"


@frozen(kw_only=True)
class Answer:
    """What goes back. A body of events must be closed: that cancels what is still generated."""

    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    body: bytes | EventStream


class Form(Protocol):
    """One of OpenAI's two forms of an answer, of one request. Pure: batches in, bytes out."""

    tellings: list[Telling]

    def begin(self) -> list[dict[str, Any]]:
        """The events before anything is generated."""
        ...

    def push(self, batch: Batch) -> list[dict[str, Any]]:
        """The events of a batch."""
        ...

    def end(self) -> list[dict[str, Any]]:
        """The events after the last batch."""
        ...

    def failed(self, refusal: Refusal) -> list[dict[str, Any]]:
        """The events of an error after the first batch."""
        ...

    def encode(self, event: dict[str, Any]) -> bytes: ...

    @property
    def last_bytes(self) -> bytes: ...

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed, once all batches were pushed."""
        ...


@define(eq=False)
class EventStream:
    """The events of one answer as bytes. `aclose` may be called by any task, at any time."""

    asking: Asking
    asked: Asked
    form: Form
    _has_begun: bool = field(default=False, init=False)
    _has_ended: bool = field(default=False, init=False)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._has_ended:
            told = b"".join(map(self.form.encode, await self._next_events()))
            if self._has_ended:
                told += self.form.last_bytes
            if told:
                return told
        raise StopAsyncIteration

    async def _next_events(self) -> list[dict[str, Any]]:
        if not self._has_begun:
            self._has_begun = True
            return self.form.begin()
        try:
            batch = await anext(self.asked.choices, None)
            if batch is None:
                self._has_ended = True
                return self.form.end()
            return await taken(self.asking, self.asked, self.form, batch)
        except AgentrtError as exc:
            self._has_ended = True
            return self.form.failed(refusal_of(exc))

    async def aclose(self) -> None:
        """Cancel what is still generated."""
        self._has_ended = True
        await self.asked.choices.aclose()


async def taken(asking: Asking, asked: Asked, form: Form, batch: Batch) -> list[dict[str, Any]]:
    """The events of a batch; with the last one of a choice its log is kept."""
    events = form.push(batch)
    if batch.completion is not None and not batch.is_changed:
        names = form.tellings[batch.index].tool_names
        await asking.keep(asked, batch.completion, names)
    return events


async def answered(asking: Asking, asked: Asked, form: Form, *, streams: bool) -> Answer:
    """The answer to a request that was submitted: at once where it streams, so that all is ready
    when its first token comes, else when it is whole."""
    if streams:
        headers = {"content-type": EVENTS, "cache-control": "no-cache"}
        return Answer(headers=headers, body=EventStream(asking, asked, form))
    try:
        form.begin()
        async for batch in asked.choices:
            await taken(asking, asked, form, batch)
    finally:
        await asked.choices.aclose()
    form.end()
    return json_answer(form.whole())


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status=status, headers={"content-type": JSON, **(headers or {})}, body=encoded(value)
    )


def refused(refusal: Refusal) -> Answer:
    """The answer that says why there is none."""
    return json_answer(refusal.body, refusal.status, refusal.headers)


def encoded(value: Any) -> bytes:
    """The value as JSON on one line, also for clients that end lines where Unicode does."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode()
