"""A guard that redacts what patterns match: secrets, private keys and e-mail addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from attrs import Attribute, field, frozen

from agentrt.errors import RequestInvalid
from agentrt.guards import GuardView, Pass, Redact, Span, Verdict


class Finder(Protocol):
    """Says what is redacted of a text that may go on."""

    def find(self, text: str, at: int) -> Span | None:
        """The first place at or after `at`, and what stands there instead."""

    def keep_from(self, text: str, start: int) -> int:
        """The first place at or after `start` where a match may begin that more text decides."""


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

    def find(self, text: str, at: int) -> Span | None:
        """The first match at or after `at`."""
        match = self.regex.search(text, at)
        return None if match is None else Span(match.start(), match.end(), f"[{self.name}]")

    def keep_from(self, text: str, start: int) -> int:
        """The first place at or after `start` where a match may begin that more text decides."""
        first = len(text) - self.longest_characters
        if not self.has_spaces:
            end = len(text)
            while end > max(start, first) and not text[end - 1].isspace():
                end -= 1
            first = max(first, end)
        return max(start, first)


_BEGIN = "-----BEGIN "
_LONGEST_LABEL = 48  # "OPENSSH ", "RSA ", "ENCRYPTED " and the like, then "PRIVATE KEY"
_LABEL = rf"[A-Z0-9 ]{{0,{_LONGEST_LABEL - 17}}}PRIVATE KEY(?: BLOCK)?"
_END = f"-----END {_LABEL}-----"
_KEY_BLOCK = re.compile(
    rf"{_BEGIN}{_LABEL}-----"
    # base64 in lines, which a JSON text writes as \n; lines such as "Proc-Type: 4,ENCRYPTED"
    r"(?:[A-Za-z0-9+/=:, ]+|(?:\n|\\n)[A-Z][A-Za-z-]{2,30}: [^\n\\]*|[\s\\]"
    rf"|(?!{_END})-)*"
    rf"(?:{_END})?"
)


@frozen(kw_only=True)
class PrivateKeys:
    """Finds private keys in the form of PEM (RFC 7468) or PGP, however long.

    A key begins with its line BEGIN and ends behind its line END. What is inside goes as it comes:
    nothing is held back but what may be the line BEGIN, 64 characters at most. Where no END comes,
    it ends before the first character that no key has, so that a key cut off is redacted too, and
    with it the plain words that follow.
    """

    name: str = "private key"

    def find(self, text: str, at: int) -> Span | None:
        """The first key at or after `at`, or what is left there of one that began before."""
        begin = 0
        while (match := _KEY_BLOCK.search(text, begin)) is not None:
            begin = match.end()
            if match.start() >= at:
                return Span(match.start(), begin, f"[{self.name}]")
            if begin > at:
                return Span(at, begin, "")
        return None

    def keep_from(self, text: str, start: int) -> int:
        """Where the text's end may be the beginning of a line BEGIN."""
        first = max(start, len(text) - len(_BEGIN) - _LONGEST_LABEL - len("-----"))
        at = text.find("-", first)
        while at >= 0:
            if _may_become_begin(text[at:]):
                return at
            at = text.find("-", at + 1)
        return len(text)


def _may_become_begin(tail: str) -> bool:
    if len(tail) <= len(_BEGIN):
        return _BEGIN.startswith(tail)
    label = tail[len(_BEGIN) :].rstrip("-")
    return tail.startswith(_BEGIN) and re.fullmatch("[A-Z0-9 ]*", label) is not None


def _as_patterns(patterns: Iterable[Finder]) -> tuple[Finder, ...]:
    return tuple(patterns)


@frozen(kw_only=True)
class PatternGuard:
    """Replaces each match by `[name]`, in text that may come in any pieces.

    Of patterns that match at the same place the first one counts. What was decided is never
    changed by later text: the guard's output does not depend on how the text is cut.
    """

    patterns: tuple[Finder, ...] = field(converter=_as_patterns)

    async def __call__(self, view: GuardView) -> Verdict:
        """The verdict on the window."""
        text = view.text
        keep_from = len(text)
        if not view.is_final:
            keep_from = min(each.keep_from(text, view.start) for each in self.patterns)
        spans, at = [], view.start
        while (found := self._next(text, at)) is not None:
            if found.start >= keep_from:
                break
            spans.append(found)
            at, keep_from = found.end, max(keep_from, found.end)
        keep_characters = len(text) - keep_from
        return Redact(spans, keep_characters) if spans else Pass(keep_characters)

    def _next(self, text: str, at: int) -> Span | None:
        """The first match at or after `at`."""
        found = None
        for each in self.patterns:
            span = each.find(text, at)
            if span is not None and (found is None or span.start < found.start):
                found = span
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
SECRETS: tuple[Finder, ...] = (
    PrivateKeys(),
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
    """A guard that writes `[key]` or `[token]` for keys of well-known services and JSON web tokens,
    and `[private key]` for private keys as PEM or PGP have them.

    It knows them by their beginning: a password without one passes.
    """
    return PatternGuard(patterns=SECRETS)
