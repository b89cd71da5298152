"""A schema's regular expressions, as ones that llguidance reads just as everybody else does.

JSON Schema's patterns are ECMA-262's; Python's `jsonschema` reads them with `re`, llguidance with
Rust's regex. The three differ: `\\d`, `\\w`, `\\s`, `.` and their opposites take other characters
beyond ASCII, Rust has set operations within brackets, and much of the syntax is one's own. What is
written here takes only texts that both ECMA-262 (with its flag u) and `re` take.
"""

from __future__ import annotations

import re

from attrs import define, field

from agentrt.errors import GrammarInvalid

# What both take, and what at least one takes, written for the inside of brackets of Rust's regex.
# ECMA-262: \d and \w are ASCII's. `re`: \d is Nd, \w is a letter, a number of any kind or _. A
# character that llguidance's Unicode does not know (Cn) may be one of a later Python's.
_DIGITS = "0-9"
_WORD = "0-9A-Za-z_"
_ANY_DIGIT = r"0-9\p{Nd}\p{Cn}"
_ANY_WORD = r"0-9A-Za-z_\p{L}\p{N}\p{Cn}"
# ECMA-262 takes U+FEFF, and `re` takes U+001C to U+001F and U+0085
_SPACE = r"\x{9}-\x{D}\x{20}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}"
_ANY_SPACE = _SPACE + r"\x{1C}-\x{1F}\x{85}\x{FEFF}"
_BOTH = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _SPACE,
    "D": f"[^{_ANY_DIGIT}]",
    "W": f"[^{_ANY_WORD}]",
    "S": f"[^{_ANY_SPACE}]",
}
_EITHER = {
    "d": _ANY_DIGIT,
    "w": _ANY_WORD,
    "s": _ANY_SPACE,
    "D": f"[^{_DIGITS}]",
    "W": f"[^{_WORD}]",
    "S": f"[^{_SPACE}]",
}
_DOT = r"[^\n\r\x{2028}\x{2029}]"  # `re` takes three of them
_NOTHING = r"[^\x{0}-\x{10FFFF}]"
# llguidance takes a set that has all control characters for one that has the quote and the
# backslash too; a set without U+0000 is taken for what it is.
NO_NUL = r"[^\x{0}]"
# What ECMA-262 reads without its flag u alone, it reads in halves of characters beyond U+FFFF.
_NO_PAIRS = r"[^\x{0}\x{10000}-\x{10FFFF}]"
_SYNTAX = frozenset("^$\\.*+?()[]{}|/")
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}

_QUANTIFIER = re.compile(r"[*+?]|\{([0-9]+)(?:,([0-9]*))?\}")
_UPPER_BOUND_ALONE = re.compile(r"\{,[0-9]*\}")  # a bound for `re`, text for ECMA-262
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})")

# Keys of a map are told apart by their patterns: there, all must agree on each text. Of texts of
# printable ASCII they do.
_PLAIN = r"[\x{20}-\x{7E}]"

# [\s\S], by what a set may have at most: one that has all control characters has all else
_ANYTHING = {NO_NUL: r"[\x{0}-\x{10FFFF}]", _NO_PAIRS: r"[\x{0}-\x{FFFF}]", _PLAIN: _PLAIN}


def exact_pattern(source: str) -> str:
    """The pattern for Rust's regex, that takes only what ECMA-262 and Python's `re` both take.

    Raises GrammarInvalid where one of them cannot read it, or reads something else in it.
    """
    reader = _Reader(source)
    return reader.text if reader.is_unicode else _Reader(source, of_set=_NO_PAIRS).text


def is_same_everywhere(source: str) -> bool:
    """Whether every engine takes just the same texts, but for a newline at the end, which `re` lets
    stand behind `$`."""
    reader = _Reader(source)
    return reader.is_same_everywhere and reader.is_unicode


def plain_pattern(source: str) -> str:
    """Those texts of printable ASCII that the pattern takes; no engine sees another in it."""
    reader = _Reader(source, of_set=_PLAIN)
    if "^" in reader.inner_anchors or "$" in reader.inner_anchors:
        raise reader.refused("as a pattern of keys, it may have ^ and $ at its ends alone")
    return reader.text


@define
class _Reader:
    """Reads a pattern, from left to right."""

    source: str
    of_set: str = NO_NUL  # what a set may have at most
    text: str = field(default="", init=False)
    is_same_everywhere: bool = field(default=True, init=False)
    is_unicode: bool = field(default=True, init=False)  # ECMA-262 reads it with its flag u
    inner_anchors: set[str] = field(factory=set, init=False)
    _place: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        branches = self._branches()
        if self._place < len(self.source):
            raise self.refused("a ) closes nothing")
        if self.of_set == _PLAIN:
            self.text = f"^(?:{'|'.join(map(self._whole, branches))})$"
        else:
            self.text = "|".join(map("".join, branches))

    def _whole(self, terms: list[str]) -> str:
        """An alternative, as it is from the first character of a text to its last."""
        first, last = terms[:1] == ["^"], terms[-1:] == ["$"]
        inner = terms[first : len(terms) - last]
        self.inner_anchors.update(inner)
        return ("" if first else f"{_PLAIN}*") + "".join(inner) + ("" if last else f"{_PLAIN}*")

    def _branches(self) -> list[list[str]]:
        """The terms of each alternative, up to what closes them."""
        branches: list[list[str]] = [[]]
        while (char := self._peek()) not in ("", ")"):
            if char == "|":
                self._place += 1
                branches.append([])
            else:
                branches[-1].append(self._term())
        return branches

    def _peek(self, num_chars: int = 1) -> str:
        return self.source[self._place : self._place + num_chars]

    def _term(self) -> str:
        char = self._peek()
        if char in ("^", "$"):
            self._place += 1
            if self._quantifier():
                raise self.refused(f"{char} cannot be repeated")
            return char
        if _QUANTIFIER.match(self.source, self._place):
            raise self.refused("there is nothing to repeat")
        if _UPPER_BOUND_ALONE.match(self.source, self._place):
            raise self.refused("engines disagree on {,n}: write {0,n}")
        atom = self._atom(char)
        repeated = self._quantifier()
        if self._quantifier() or (repeated and self._peek() in ("+", "*", "?")):
            raise self.refused("engines disagree on a repetition of a repetition")
        return atom + repeated

    def _quantifier(self) -> str:
        """A repetition, if there is one; that it is lazy changes no text that it takes."""
        found = _QUANTIFIER.match(self.source, self._place)
        if found is None:
            return ""
        if found[2] and int(found[1]) > int(found[2]):
            raise self.refused("a repetition's bounds are the wrong way round")
        self._place = found.end() + (self.source[found.end() :][:1] == "?")
        return found[0]

    def _atom(self, char: str) -> str:
        self._place += 1
        if char == "(":
            return self._group()
        if char == "[":
            return self._set()
        if char == ".":
            self.is_same_everywhere = False
            return self._set_of(_DOT)
        if char == "\\":
            escaped = self._escape(in_set=False)
            return (
                self._set_of(f"[{_BOTH[escaped[1]]}]") if len(escaped) == 2 else self._char(escaped)
            )
        self.is_unicode &= char not in _SYNTAX
        return self._char(char)

    def _group(self) -> str:
        if self._peek(2) == "?:":
            self._place += 2
        elif self._peek() == "?":
            raise self.refused(
                "of groups that begin with (?, only (?: is read: there are no lookarounds, named "
                "groups or flags"
            )
        branches = self._branches()
        if self._peek() != ")":
            raise self.refused("a ( is not closed")
        self._place += 1
        self.inner_anchors.update(term for terms in branches for term in terms)
        return f"(?:{'|'.join(map(''.join, branches))})"

    def _escape(self, *, in_set: bool) -> str:
        """What stands behind a backslash: a character, or `\\` and the letter of a class."""
        char = self._peek()
        self._place += 1
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char and char in "dwsDWS":
            self.is_same_everywhere = False
            return f"\\{char}"
        if char == "b" and in_set:
            return "\b"
        if char == "0" and not self._peek().isdigit():
            return "\0"
        found = _HEX.match(self.source, self._place - 1)
        if found is not None:
            self._place = found.end()
            code = int(found[1] or found[2], 16)
            if 0xD800 <= code <= 0xDFFF:
                raise self.refused("half a surrogate pair is no character: write the character")
            return chr(code)
        if not char or (char.isascii() and char.isalnum()):
            raise self.refused(f"\\{char} is not read, or not by every engine")
        self.is_unicode &= char in _SYNTAX or (in_set and char == "-")
        return char

    def _set(self) -> str:
        """The rest of a set in brackets."""
        is_negated = self._peek() == "^"
        self._place += is_negated
        if self._peek() == "]":
            raise self.refused("engines disagree on a ] that is the first of a set: write \\]")
        was_same, members = self.is_same_everywhere, self._members()
        classes = {member[1] for member in members if len(member) == 2}
        if any(letter.swapcase() in classes for letter in classes):  # [\\s\\S] is any character
            self.is_same_everywhere = was_same
            return _NOTHING if is_negated else _ANYTHING[self.of_set]
        known = _EITHER if is_negated else _BOTH
        written = "".join(
            known[member[1]] if len(member) == 2 else "-".join(map(_code, member[::2]))
            for member in members
        )
        return self._set_of(f"[{'^' if is_negated else ''}{written}]")

    def _char(self, char: str) -> str:
        if char == "\0" or (self.of_set == _PLAIN and not " " <= char <= "~"):
            return self._set_of(f"[{_code(char)}]")
        if self.of_set == _NO_PAIRS and char > "\uffff":
            raise self.refused(f"ECMA-262 reads it without the flag u alone, and {char} as two")
        return char if char.isascii() and char.isalnum() else _code(char)

    def _set_of(self, written: str) -> str:
        return f"[{written}&&{self.of_set}]"

    def _members(self) -> list[str]:
        """Each member of a set: `\\d`, `x`, or `x-y` where x and y are characters."""
        members = []
        while self._peek() != "]":
            first = self._member()
            if self._peek() != "-" or self._peek(2) in ("-", "-]"):
                members.append(first)
                continue
            self._place += 1
            last = self._member()
            if len(first) == 2 or len(last) == 2:
                raise self.refused("a class such as \\d is no end of a range: write - last")
            if first > last:
                raise self.refused("a range in a set is the wrong way round")
            members.append(f"{first}-{last}")
        self._place += 1
        return members

    def _member(self) -> str:
        char = self._peek()
        if not char:
            raise self.refused("a [ is not closed")
        self._place += 1
        return self._escape(in_set=True) if char == "\\" else char

    def refused(self, reason: str) -> GrammarInvalid:
        """The error that says why."""
        return GrammarInvalid(f"the pattern {self.source!r} cannot be followed: {reason}")


def _code(char: str) -> str:
    return f"\\x{{{ord(char):X}}}"
