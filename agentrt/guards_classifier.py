"""A guard that asks a classifier, sentence by sentence."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping

from attrs import field, frozen

from agentrt.guards import GuardView, Pass, Redact, Span, Stop, Verdict

Classify = Callable[[str], Awaitable[str | None]]
_SENTENCE_END = re.compile(r"[.!?:;](?=\s)|\n")


@frozen(kw_only=True)
class ClassifierGuard:
    """Holds text back to the end of a sentence, and asks `classify` for the label of what is new.

    None, or a label without an entry, lets it pass. A label in `replies` puts that text in its
    place; one in `stops` ends the turn, with that reason. `classify` may await a model; what it
    reads is at most `longest_characters`, besides a text that is decided whole.
    """

    classify: Classify
    replies: Mapping[str, str] = field(factory=dict)
    stops: Mapping[str, str] = field(factory=dict)
    longest_characters: int = 400

    async def __call__(self, view: GuardView) -> Verdict:
        """The verdict on the window's whole sentences."""
        window = view.window
        end = len(window) if view.is_final else self._decidable(window)
        if end == 0:
            return Pass(len(window))
        label = await self.classify(window[:end])
        if label is not None and label in self.stops:
            return Stop(self.stops[label])
        if label is not None and label in self.replies:
            span = Span(view.start, view.start + end, self.replies[label])
            return Redact((span,), len(window) - end)
        return Pass(len(window) - end)

    def _decidable(self, window: str) -> int:
        ends = [match.end() for match in _SENTENCE_END.finditer(window)]
        if ends:
            return ends[-1]
        return len(window) if len(window) >= self.longest_characters else 0
