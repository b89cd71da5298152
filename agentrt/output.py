"""Output tokens to text: whole characters only, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from attrs import define, field


class TextDecoder(Protocol):
    """Token ids to text, as far as it is certain."""

    def push(self, ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...


@define
class OutputText:
    """The text of one generation.

    Text that may still become a stop string is held back; `finish` releases it. Nothing is lost:
    the pieces join to the decoded output, cut at the first stop string.
    """

    decoder: TextDecoder
    stops: tuple[str, ...]
    _held: str = field(default="", init=False)
    _pieces: list[str] = field(factory=list, init=False)
    stopped: bool = field(default=False, init=False)

    def push(self, token_id: int) -> str:
        """The text that is certain now. Sets `stopped` when a stop string was completed."""
        return self._take(self.decoder.push([token_id]), final=False)

    def finish(self) -> str:
        """The rest, when the generation ends for another reason than a stop string."""
        return "" if self.stopped else self._take(self.decoder.flush(), final=True)

    @property
    def text(self) -> str:
        """All text that was released."""
        return "".join(self._pieces)

    def _take(self, new: str, *, final: bool) -> str:
        if not self.stops:
            if new:
                self._pieces.append(new)
            return new
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            released, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            keep = 0 if final else self._unsure()
            cut = len(self._held) - keep
            released, self._held = self._held[:cut], self._held[cut:]
        if released:
            self._pieces.append(released)
        return released

    def _unsure(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
