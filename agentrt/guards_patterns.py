"""A guard that redacts what patterns match: secrets and e-mail addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import Attribute, field, frozen

from agentrt.errors import RequestInvalid
from agentrt.guards import GuardView, Pass, Redact, Span, Verdict


def _check_longest(_: object, __: Attribute[int], value: int) -> None:
    if value < 1:
        raise RequestInvalid(f"longest_characters must be at least 1, got {value}")


@frozen(kw_only=True)
class Pattern:
    """What is redacted, and what stands there instead.

    `longest_characters` bounds a match, and so what is held back; the regex must bound itself. It
    may look one character to either side. `has_spaces` says that a match may hold white space:
    without it only the last word is held back.
    """

    name: str
    regex: re.Pattern[str]
    longest_characters: int = field(validator=_check_longest)
    has_spaces: bool = False

    def keep_from(self, text: str, start: int) -> int:
        """The first place at or after `start` where a match may begin that more text decides."""
        first = len(text) - self.longest_characters
        if not self.has_spaces:
            end = len(text)
            while end > max(start, first) and not text[end - 1].isspace():
                end -= 1
            first = max(first, end)
        return max(start, first)


def _as_patterns(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    return tuple(patterns)


@frozen(kw_only=True)
class PatternGuard:
    """Replaces each match by `[name]`, in text that may come in any pieces.

    Of patterns that match at the same place the first one counts. What was decided is never
    changed by later text: the guard's output does not depend on how the text is cut.
    """

    patterns: tuple[Pattern, ...] = field(converter=_as_patterns)

    async def __call__(self, view: GuardView) -> Verdict:
        """The verdict on the window."""
        text = view.text
        keep_from = len(text)
        if not view.is_final:
            keep_from = min(each.keep_from(text, view.start) for each in self.patterns)
        spans, at = [], view.start
        while (found := self._next(text, at)) is not None:
            name, start, end = found
            if start >= keep_from:
                break
            spans.append(Span(start, end, f"[{name}]"))
            at, keep_from = end, max(keep_from, end)
        keep_characters = len(text) - keep_from
        return Redact(spans, keep_characters) if spans else Pass(keep_characters)

    def _next(self, text: str, at: int) -> tuple[str, int, int] | None:
        """The name and place of the first match at or after `at`."""
        found = None
        for each in self.patterns:
            match = each.regex.search(text, at)
            if match is not None and (found is None or match.start() < found[1]):
                found = (each.name, match.start(), match.end())
        return found


_WORD = "[A-Za-z0-9_-]"
EMAIL = Pattern(
    name="e-mail",
    regex=re.compile(
        r"(?<![\w.+-])[A-Za-z0-9](?:[\w.+-]{0,62}[\w+-])?@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}",
        re.ASCII,
    ),
    longest_characters=64 + 1 + 4 * 64 + 24,
)
SECRETS = (
    Pattern(
        name="key",
        # the prefixes that OpenAI, Anthropic, Stripe, Hugging Face, GitHub, GitLab and Slack use
        regex=re.compile(
            rf"(?<!{_WORD})(?:sk-|sk_live_|rk_live_|hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)"
            rf"{_WORD}{{16,200}}"
        ),
        longest_characters=211,
    ),
    Pattern(
        name="key",
        regex=re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
        longest_characters=20,
    ),
    Pattern(
        name="token",
        regex=re.compile(r"(?<![\w-])eyJ[\w-]{8,512}\.[\w-]{8,1024}\.[\w-]{8,512}", re.ASCII),
        longest_characters=3 + 512 + 1 + 1024 + 1 + 512,
    ),
)


def redact_emails() -> PatternGuard:
    """A guard that writes `[e-mail]` for each address."""
    return PatternGuard(patterns=(EMAIL,))


def redact_secrets() -> PatternGuard:
    """A guard that writes `[key]` or `[token]` for keys of well-known services and JSON web tokens.

    It knows them by their prefix: a password without one passes.
    """
    return PatternGuard(patterns=SECRETS)
