"""Patterns of schemas: what the grammar lets through, Python's `re` and ECMA-262 take too."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentrt.errors import GrammarInvalid
from agentrt.grammar import GrammarCompiler, exact_json_value, json_schema
from agentrt.grammar_patterns import exact_pattern, is_same_everywhere, plain_pattern
from agentrt.grammar_schemas import exact_schema

# ECMA-262's classes, in the syntax of `re`: \s is WhiteSpace and LineTerminator, \d and \w are
# ASCII's, and a dot is anything but a line's end.
_SPACE = "\\t\\n\\v\\f\\r \\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
ATOMS = {
    "a": "a",
    "é": "é",
    "\\.": "\\.",
    "\\u00e9": "é",
    "\\x41": "A",
    "}": "\\}",
    ".": "[^\\n\\r\\u2028\\u2029]",
    "\\d": "[0-9]",
    "\\D": "[^0-9]",
    "\\w": "[0-9A-Za-z_]",
    "\\W": "[^0-9A-Za-z_]",
    "\\s": f"[{_SPACE}]",
    "\\S": f"[^{_SPACE}]",
    "[^\\W]": "[0-9A-Za-z_]",
    "[^\\d\\s]": f"[^0-9{_SPACE}]",
    "[\\W_]": "(?:[^0-9A-Za-z_]|_)",
    "[^\\w-]": "[^0-9A-Za-z_-]",
    "[\\s\\S]": "[\\s\\S]",
    '[^"]': '[^"]',
    '[^"\\n]': '[^"\\n]',
    "[^\\\\]": "[^\\\\]",
    "[\\x00-\\x1f]": "[\\x00-\\x1f]",
    "[a&&b]": "[ab&]",
    "[[a]": "[\\[a]",
    "[a-c-]": "[abc-]",
    "(?:a|é|)": "(?:a|é|)",
    "(b|\\d)": "(?:b|[0-9])",
}
CHARACTERS = (
    'abAZ019_- .&[]}"\\/\n\r\t\x00\x01\x08\x0b\x1c\x1f\x7f\x85\xa0\xb2\xbdé\u02bc\u0378\u0663\u0964'
    "\u180e\u2028\u200b\u2177\u212a\u3000安\ufeff\uff11𝟘🐲"
)
terms = st.tuples(
    st.sampled_from(sorted(ATOMS)), st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "*?"])
)
texts = st.lists(st.text(CHARACTERS, max_size=4), min_size=1, max_size=12)


def takes(compiler: GrammarCompiler, tokenizer: Any, schema: Any, value: Any) -> bool:
    return takes_exactly(compiler, tokenizer, exact_schema(schema), value)


def takes_exactly(compiler: GrammarCompiler, tokenizer: Any, schema: Any, value: Any) -> bool:
    constraint = compiler.compile(f"start: {exact_json_value(schema)}\n")
    tokens = tokenizer.encode(json.dumps(value, ensure_ascii=False))
    return all(map(constraint.accept, tokens)) and constraint.may_end


@settings(max_examples=150, deadline=None)
@given(st.lists(terms, min_size=1, max_size=3), st.booleans(), st.booleans(), texts)
@example([("\\W", "")], True, True, ["安"])
@example([("\\S", "")], True, True, ["\ufeff"])
@example([("[^\\W]", "")], True, True, ["安"])
@example([('[^"]', "")], True, True, ['"'])
@example([("[\\x00-\\x1f]", "")], True, True, ['"'])
def test_what_is_taken_both_engines_take(
    compiler, tokenizer, terms, has_start, has_end, texts
) -> None:
    source = "".join(atom + repeated for atom, repeated in terms)
    ecma = "".join(f"(?:{ATOMS[atom]}){repeated}" for atom, repeated in terms)
    source = f"{'^' * has_start}{source}{'$' * has_end}"
    ecma = f"{'^' * has_start}{ecma}" + "\\Z" * has_end
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read in sets
        python, ecma_262 = re.compile(source), re.compile(ecma)
    for text in texts:
        if takes(compiler, tokenizer, {"type": "string", "pattern": source}, text):
            assert python.search(text), (source, text)
            assert ecma_262.search(text), (source, text)
        elif source.isascii() and text.isascii() and text.isprintable():
            # of plain texts nothing is lost
            assert not python.search(text), (source, text)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=a)b", "lookarounds"),
        ("(?i)a", "flags"),
        ("(?P<x>a)", "named groups"),
        ("(?<x>a)", "named groups"),
        (r"\bfoo", r"\\b is not read"),
        (r"(a)\1", r"\\1 is not read"),
        (r"\p{L}", r"\\p is not read"),
        (r"a\Z", r"\\Z is not read"),
        (r"\cA", r"\\c is not read"),
        (r"\ud83d\udc32", "surrogate"),
        ("[]a]", "first of a set"),
        ("[^]", "first of a set"),
        (r"[\d-z]", "no end of a range"),
        ("[z-a]", "wrong way round"),
        ("a{2,1}", "wrong way round"),
        ("a{,2}", "write {0,n}"),
        ("a*+", "repetition of a repetition"),
        ("a{2}{3}", "repetition of a repetition"),
        ("^*a", "cannot be repeated"),
        ("*a", "nothing to repeat"),
        ("a|*", "nothing to repeat"),
        ("(a", "not closed"),
        ("a)", "closes nothing"),
        ("[a", "not closed"),
        ("a\\", "is not read"),
    ],
)
def test_what_engines_do_not_agree_on_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(GrammarInvalid, match=reason):
        exact_pattern(pattern)
    with pytest.raises(GrammarInvalid, match="pattern"):
        json_schema({"properties": {"a": {"items": {"pattern": pattern}}}})


@settings(max_examples=300, deadline=None)
@given(st.text("ab\\dwsS.^$|()[]{}*+?-,012&~ é", max_size=8))
def test_what_is_read_python_reads_too(pattern: str) -> None:
    try:
        exact_pattern(pattern)
    except GrammarInvalid:
        return
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read in sets
        re.compile(pattern)


def test_a_pattern_of_keys_keeps_to_plain_texts(compiler, tokenizer) -> None:
    assert is_same_everywhere("^[a-z]+$")
    assert not is_same_everywhere(r"^\w+$")
    for source in (r"^\w+$", "x.", "^a|b$", r"(?:\D|é)"):
        schema = {"type": "string", "pattern": plain_pattern(source)}
        for text in ("ab", "xy", "axe", "b", "é", "xé", "a\n", "x\r", "", "9"):
            is_taken = text.isascii() and text.isprintable() and bool(re.search(source, text))
            assert takes_exactly(compiler, tokenizer, schema, text) == is_taken, (source, text)
    with pytest.raises(GrammarInvalid, match="at its ends alone"):
        plain_pattern(r"(^\w)")


def test_what_ecma_262_reads_in_halves_of_characters_takes_no_pair(compiler, tokenizer) -> None:
    """A pattern that its flag u refuses: there, a character beyond U+FFFF is two."""
    for source in ("^.\\-$", "^[^a]\\-$", "^[\\s\\S]-{$", "^[^a]-}$"):
        schema = {"type": "string", "pattern": source}
        end = source[-2:].strip("-$").replace("\\", "")
        for text, is_taken in [(f"é-{end}", True), (f"🐲-{end}", False)]:
            assert takes(compiler, tokenizer, schema, text) == is_taken, (source, text)
    assert takes(compiler, tokenizer, {"type": "string", "pattern": "^[^a]$"}, "🐲")
    with pytest.raises(GrammarInvalid, match="flag u"):
        exact_pattern("🐲}")
