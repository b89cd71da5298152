"""What a model writes in a turn, taken apart as it streams: reasoning, text and tool calls.

Text in, events out; nothing here waits or does I/O. How calls look is a family's (CallFormat).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, NoReturn

from attrs import field, frozen

from agentrt.parsers_cursor import Cursor, Wait
from agentrt.types import (
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallDelta,
    ToolCallStarted,
)

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ParseEvent = str | ReasoningDelta | ToolCallStarted | ToolCallDelta | ToolCallArguments
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")


@frozen(kw_only=True, eq=False)
class CallFormat:
    """How one family of models writes tool calls.

    `opens` are the texts that may begin a call; `read` reads what follows one of them and says
    whether that was a call. `keeps_text` says that templates of the family take an assistant's turn
    with calls as plain content, word for word, so that the token log only grows. `shape` shows a
    call to models whose template has no tools.
    """

    name: str
    shape: str
    opens: tuple[str, ...]
    read: Callable[[TurnParser], Wait] = field(repr=False)
    render: Callable[[Sequence[ToolCall]], str] = field(repr=False)
    keeps_text: bool = True


class TurnParser:
    """Splits one turn of a model.

    Text is held back only while it may be the start of a call. What looks like a call but is not
    well-formed, or is cut off, comes out as plain text, word for word: its `ToolCallStarted` and
    deltas then stand without `ToolCallArguments`. White space around calls belongs to the format
    and is dropped after one. A call is complete when its JSON closes: its closing tag may be
    missing.

    `names` are the tools that a format without tags needs to know a call from text. With `thinks`
    the turn may begin with a `<think>` block; with `is_thinking` it begins inside one.
    """

    # State: the cursor; _events, not handed out yet; _steps, the parser, which waits for text.

    def __init__(
        self,
        form: CallFormat | None,
        *,
        names: Collection[str] | None = None,
        first_call: int = 0,
        thinks: bool = False,
        is_thinking: bool = False,
    ) -> None:
        self.cursor = Cursor()
        self.form = form
        self._names = None if names is None else frozenset(names)
        self._first_call = first_call
        self._thinks = thinks or is_thinking
        self._is_thinking = is_thinking
        self._num_calls = 0
        self._events: list[ParseEvent] = []
        self._steps = self._parse()
        next(self._steps, None)

    def push(self, text: str) -> list[ParseEvent]:
        """Takes the next piece of text and returns what it settles."""
        self.cursor.held += text
        return self._advance()

    def flush(self) -> list[ParseEvent]:
        """Ends the turn: what is still held back is plain text."""
        self.cursor.has_ended = True
        return self._advance()

    def _advance(self) -> list[ParseEvent]:
        next(self._steps, None)
        events, self._events = self._events, []
        return events

    # ---- the parser

    def _parse(self) -> Generator[None, None, None]:
        yield  # for the first text
        if self._thinks:
            yield from self._reasoning()
        while (yield from self._text()):
            if not (yield from self._read()):
                self._emit_text()

    def _read(self) -> Wait:
        assert self.form is not None
        return (yield from self.form.read(self))

    def _reasoning(self) -> Generator[None, None, None]:
        cursor = self.cursor
        if not self._is_thinking:
            yield from cursor.skip_space()
            if not (yield from cursor.reads(THINK_OPEN)):
                cursor.at = 0
                return
        yield from cursor.skip_space()
        cursor.settle()
        while True:
            cursor.at, found = cursor.find((THINK_CLOSE,))
            if text := cursor.settle():
                self._events.append(ReasoningDelta(text))
            if found:
                break
            if not (yield from cursor.more()):
                return
        cursor.at = len(THINK_CLOSE)
        yield from cursor.skip_space()
        cursor.settle()

    def _text(self) -> Wait:
        """Pass plain text on, up to what may begin a call; False at the end of the turn."""
        cursor = self.cursor
        opens = () if self.form is None else self.form.opens
        while True:
            cursor.at, found = cursor.find(opens)
            self._emit_text()
            if found:
                cursor.at = len(found)
                return True
            if not (yield from cursor.more()):
                return False

    def _emit_text(self) -> None:
        if text := self.cursor.settle():
            self._events.append(text)

    # ---- for the families

    def is_tool(self, name: str) -> bool:
        """Whether a call may have this name."""
        return self._names is None or name in self._names

    def started(self) -> None:
        """A call begins here."""
        self._events.append(ToolCallStarted(self._num_calls))

    def finished(self, name: str, arguments: dict[str, Any]) -> None:
        """A call is complete, and what was read is settled."""
        number = self._first_call + self._num_calls
        self._num_calls += 1
        # Nine letters and digits: Mistral's templates take no other ids.
        self._events.append(ToolCallArguments(ToolCall(f"call{number:05d}", name, arguments)))
        self.cursor.settle()

    def streamed(self, name: str, value: Wait) -> Wait:
        """Read a call's arguments, and pass them on as they come."""
        cursor, index = self.cursor, self._num_calls
        sent = cursor.at

        def send() -> None:
            nonlocal sent
            if text := cursor.held[sent : cursor.at]:
                self._events.append(ToolCallDelta(index, name, text))
            sent = cursor.at

        cursor.watch = send
        try:
            is_whole = yield from value
        finally:
            cursor.watch = None
        send()
        return is_whole

    def call_object(self, *, is_tagged: bool) -> Wait:
        """Read one call, as a JSON object that comes next, and finish it. False if it is none.

        Without a tag the object must soon name a tool.
        """
        cursor = self.cursor
        yield from cursor.skip_space()
        start, name, has_started = cursor.at, "", is_tagged
        if not (yield from cursor.reads("{")):
            return False
        while True:
            yield from cursor.skip_space()
            key = yield from self._key()
            if key is None:
                return False
            begin = cursor.at
            if key in _ARGUMENT_KEYS and has_started:
                is_whole = yield from self.streamed(name, cursor.json_value())
            elif has_started or key in ("name", *_OTHER_KEYS):
                is_whole = yield from cursor.json_value()
            else:
                return False
            if not is_whole:
                return False
            if key == "name":
                name = _text_of(cursor.held[begin : cursor.at])
                if not has_started and not self.is_tool(name):
                    return False
                if not has_started:
                    has_started = True
                    self.started()
            yield from cursor.skip_space()
            if (yield from cursor.reads("}")):
                break
            if not (yield from cursor.reads(",")):
                return False
        return self.finish_call(cursor.held[start : cursor.at])

    def _key(self) -> Generator[None, None, str | None]:
        """Read a key of an object and its colon."""
        cursor = self.cursor
        begin = cursor.at
        if (yield from cursor.sees(('"',))) is None or not (yield from cursor.string()):
            return None
        key = _text_of(cursor.held[begin : cursor.at])
        yield from cursor.skip_space()
        if not (yield from cursor.reads(":")):
            return None
        yield from cursor.skip_space()
        return key

    def finish_call(self, text: str) -> bool:
        """Finish the call that this JSON object is, if it is one."""
        call = parse_json(text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        given = [key for key in _ARGUMENT_KEYS if key in call]
        if len(given) != 1 or not isinstance(call[given[0]], dict):
            return False
        if not set(call) <= {"name", given[0], *_OTHER_KEYS}:
            return False
        self.finished(call["name"], call[given[0]])
        return True

    def after_call(self, close: str = "", separator: str = "") -> Wait:
        """Read what belongs to the format after a call; the text goes on after it."""
        cursor = self.cursor
        yield from cursor.skip_space()
        if close and (yield from cursor.reads(close)):
            cursor.settle()
            yield from cursor.skip_space()
        if separator and (yield from cursor.reads(separator)):
            yield from cursor.skip_space()
        assert self.form is not None
        follows = yield from cursor.sees(self.form.opens)
        if follows is None and not (cursor.has_ended and not cursor.held.strip()):
            cursor.at = 0  # it was text after all
        else:
            cursor.settle()
        return True


def parse_json(text: str) -> Any:
    """The value, or None where the text is no JSON or holds what no tokenizer takes."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate fits no tokenizer
    except (ValueError, RecursionError):
        return None
    return value


def _text_of(quoted: str) -> str:
    value = parse_json(quoted)
    return value if isinstance(value, str) else ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_turn(parser: TurnParser, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The plain text and the calls of a finished turn."""
    events = [*parser.push(text), *parser.flush()]
    plain = "".join(event for event in events if isinstance(event, str))
    return plain, tuple(event.call for event in events if isinstance(event, ToolCallArguments))
