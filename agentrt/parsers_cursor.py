"""The place of a parser in a text that is still being written."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

from attrs import define, field

Wait = Generator[None, None, bool]  # yields while it needs more text; its value is the answer

_SPACE = " \t\r\n"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BRACKETS = {'"': re.compile(r'["(){}\[\]]'), "\"'": re.compile(r"[\"'(){}\[\]]")}
_SCALAR = re.compile(r"[^\s,}\]]*")


@define(eq=False)
class Cursor:
    """Text that came, and how far it was read.

    `held[:at]` was read but is not settled: `settle` lets it go, `held` begins anew. Every method
    that returns a Wait decides only what no further text can change, so that it does not matter
    how the text is cut. `watch` is called before each wait.
    """

    held: str = ""
    at: int = 0
    has_ended: bool = False
    watch: Callable[[], None] | None = field(default=None, repr=False)

    def settle(self) -> str:
        """Let go of what was read, and return it."""
        read, self.held, self.at = self.held[: self.at], self.held[self.at :], 0
        return read

    def more(self) -> Wait:
        """Wait for more text; False if none will come."""
        if self.has_ended:
            return False
        if self.watch is not None:
            self.watch()
        yield
        return True

    def has(self, num: int) -> Wait:
        """Whether `num` more characters come."""
        while len(self.held) - self.at < num:
            if not (yield from self.more()):
                return False
        return True

    def skip_space(self) -> Wait:
        """Read white space. False where the text ends with it."""
        while (yield from self.has(1)):
            if self.held[self.at] not in _SPACE:
                return True
            self.at += 1
        return False

    def sees(self, literals: Sequence[str]) -> Generator[None, None, str | None]:
        """Which of these texts comes next, without reading it."""
        while True:
            rest = self.held[self.at : self.at + max(map(len, literals))]
            found = next((each for each in literals if rest.startswith(each)), None)
            if found is not None:
                return found
            if not any(each.startswith(rest) for each in literals):
                return None
            if not (yield from self.more()):
                return None

    def reads(self, literal: str) -> Wait:
        """Read this text, if it comes next."""
        if (yield from self.sees((literal,))) is None:
            return False
        self.at += len(literal)
        return True

    def find(self, literals: Sequence[str]) -> tuple[int, str | None]:
        """Where the first of these texts begins, at or after `at`. Where there is none yet: up to
        where none can begin, and None."""
        places = [(self.held.find(each, self.at), each) for each in literals]
        found = [place for place in places if place[0] >= 0]
        if found:
            return min(found, key=lambda place: (place[0], -len(place[1])))
        keep = 0
        if not self.has_ended:
            keep = max((_num_begun(self.held, self.at, each) for each in literals), default=0)
        return len(self.held) - keep, None

    def name(self) -> Generator[None, None, str]:
        """Read a name, maybe none."""
        while True:
            match = _NAME.match(self.held, self.at)
            end = self.at if match is None else match.end()
            if end < len(self.held) or not (yield from self.more()):
                name, self.at = self.held[self.at : end], end
                return name

    def string(self) -> Wait:
        """Read a quoted text, whose quote comes next. False if it never ends."""
        quote, self.at = self.held[self.at], self.at + 1
        while True:
            at = min(
                (p for p in (self.held.find(c, self.at) for c in (quote, "\\")) if p >= 0),
                default=-1,
            )
            if at < 0:
                self.at = len(self.held)
            elif self.held[at] == quote:
                self.at = at + 1
                return True
            else:
                self.at = at
                if not (yield from self.has(2)):
                    self.at = len(self.held)
                    return False
                self.at += 2
                continue
            if not (yield from self.more()):
                return False

    def balanced(self, quotes: str = '"') -> Wait:
        """Read a value in brackets, whose first one comes next, with all that is inside."""
        depth = 0
        while True:
            match = _BRACKETS[quotes].search(self.held, self.at)
            if match is None:
                self.at = len(self.held)
                if not (yield from self.more()):
                    return False
                continue
            self.at = match.start()
            if match[0] in quotes:
                if not (yield from self.string()):
                    return False
                continue
            self.at += 1
            depth += 1 if match[0] in "([{" else -1
            if depth == 0:
                return True

    def json_value(self) -> Wait:
        """Read a JSON value, roughly: `json` checks it later. False if it does not end."""
        if not (yield from self.has(1)):
            return False
        if self.held[self.at] == '"':
            return (yield from self.string())
        if self.held[self.at] in "[{":
            return (yield from self.balanced())
        while True:
            match = _SCALAR.match(self.held, self.at)
            assert match is not None
            if match.end() < len(self.held):
                is_value = match.end() > self.at
                self.at = match.end()
                return is_value
            if not (yield from self.more()):
                self.at = len(self.held)
                return False


def _num_begun(text: str, start: int, literal: str) -> int:
    """How many characters at the end of `text` may be the start of `literal`."""
    longest = min(len(text) - start, len(literal) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(literal[:n])), 0)
