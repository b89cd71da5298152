"""Random grammars and random seeds: whatever pure chance writes under a grammar's masks matches it.

JSON schemas have their own such test in test_structured. Here are regexes, checked by Python's re,
and Lark grammars with recursive rules, checked by a recogniser of our own.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from agentrt import grammar
from agentrt.grammar import GrammarCompiler

MOST_TOKENS = 60

# Characters that mean something in a regex, in Lark, or in JSON, and one of two bytes.
LETTERS = "abAZ09 /\\\"'.*?[](){}|^$-_\n\té"
letters = st.sampled_from(LETTERS)


def written(compiler: GrammarCompiler, tokenizer: Any, text: str, seed: int) -> str | None:
    """What chance writes, which leans to ending; None where it is too long."""
    chance, constraint, tokens = np.random.default_rng(seed), compiler.compile(text), []
    (end,) = tokenizer.eos_token_ids
    while not constraint.is_finished:
        allowed = np.flatnonzero(np.unpackbits(constraint.mask().view("u1"), bitorder="little"))
        assert len(allowed)
        token = end if end in allowed and chance.random() < 0.3 else int(chance.choice(allowed))
        assert constraint.accept(token)
        if token == end:
            break
        tokens.append(token)
        if len(tokens) > MOST_TOKENS:
            return None
    return str(tokenizer.decode(tokens))


# ---- regexes that mean the same in Rust and in Python


def _class(members: list[str], is_negated: bool) -> str:
    inside = "".join(re.escape(each) for each in members)
    return f"[{'^' if is_negated else ''}{inside}]"


def _repeated(inner: str, bounds: tuple[int, int | None]) -> str:
    low, more = bounds
    return f"(?:{inner}){{{low},{'' if more is None else low + more}}}"


atoms = (
    letters.map(re.escape)
    | st.builds(_class, st.lists(letters, min_size=1, max_size=4), st.booleans())
    | st.sampled_from([r"[0-9]", r"[a-z]", r"[^a-z\n]", "."])
)
regexes = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda each: f"(?:{'|'.join(each)})")
        | st.builds(_repeated, inner, st.tuples(st.integers(0, 2), st.none() | st.integers(0, 3)))
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(regexes, st.integers(0, 2**32))
def test_every_output_matches_a_random_regex(compiler, tokenizer, pattern: str, seed: int) -> None:
    text = written(compiler, tokenizer, grammar.regex(pattern), seed)
    event("too long" if text is None else "checked")
    assume(text is not None)
    assert text is not None
    assert re.fullmatch(pattern, text), (pattern, text)


# ---- Lark grammars: rules of alternatives of sequences, of literals, terminals and other rules

Symbol = tuple[str, str]  # what it is, and its text: ("literal", "a"), ("regex", "[a-c]"), ...
Rules = list[list[list[Symbol]]]
REGEXES = ["[a-c]", "[0-9]{1,2}", "x|yz", r"\."]


terminals = st.text(letters, min_size=1, max_size=3).map(
    lambda text: ("literal", text)
) | st.sampled_from(REGEXES).map(lambda text: ("regex", text))


@st.composite
def rule_sets(draw: Any) -> Rules:
    """Each rule has an alternative without rules, so that each can end."""
    num_rules = draw(st.integers(1, 4))
    rules = st.integers(0, num_rules - 1).map(lambda rule: ("rule", str(rule)))
    plain = st.lists(terminals, min_size=1, max_size=2)
    others = st.lists(st.lists(terminals | rules, max_size=3), max_size=3)
    return [[draw(plain), *draw(others)] for _ in range(num_rules)]


def as_lark(rules: Rules) -> str:
    def shown(symbol: Symbol) -> str:
        kind, text = symbol
        if kind == "rule":
            return f"rule_{text}"
        return f"/{text}/" if kind == "regex" else grammar.quoted(text)

    lines = [
        f"rule_{number}: " + " | ".join(" ".join(map(shown, each)) or '""' for each in alternatives)
        for number, alternatives in enumerate(rules)
    ]
    return "\n".join(["start: rule_0", *lines]) + "\n"


def is_derived(rules: Rules, text: str) -> bool:
    """Whether rule 0 can be the whole text. Ends of each rule at each place grow to a fixed point,
    since rules may call themselves before they have read anything."""
    ends: dict[tuple[int, int], set[int]] = {}

    @functools.cache
    def of_regex(pattern: str, start: int) -> frozenset[int]:
        stops = range(start, len(text) + 1)
        return frozenset(end for end in stops if re.fullmatch(pattern, text[start:end]))

    def of_symbol(symbol: Symbol, start: int) -> set[int]:
        kind, what = symbol
        if kind == "rule":
            return ends.setdefault((int(what), start), set())
        if kind == "regex":
            return set(of_regex(what, start))
        return {start + len(what)} if text.startswith(what, start) else set()

    def of_sequence(sequence: list[Symbol], start: int) -> set[int]:
        places = {start}
        for symbol in sequence:
            places = {end for place in places for end in of_symbol(symbol, place)}
        return places

    has_grown = True
    while has_grown:
        has_grown = False
        for number, alternatives in enumerate(rules):
            for start in range(len(text) + 1):
                known = ends.setdefault((number, start), set())
                found = set().union(*(of_sequence(each, start) for each in alternatives))
                if not found <= known:
                    known |= found
                    has_grown = True
    return len(text) in ends[0, 0]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("a", True), ("(a)", True), ("((a))", True), ("(a", False), ("", False), ("()", False)],
)
def test_the_recogniser_itself(text: str, is_one: bool) -> None:
    nested = [[[("literal", "a")], [("literal", "("), ("rule", "0"), ("literal", ")")]]]
    assert is_derived(nested, text) == is_one
    left = [[[("literal", "a")], [("rule", "0"), ("regex", "[0-9]")], [("rule", "0")]]]
    assert is_derived(left, "a12")
    assert not is_derived(left, "12")


@settings(max_examples=150, deadline=None)
@given(rule_sets(), st.integers(0, 2**32))
def test_every_output_is_derived_by_a_random_lark_grammar(
    compiler, tokenizer, rules: Rules, seed: int
) -> None:
    text = written(compiler, tokenizer, grammar.lark(as_lark(rules)), seed)
    event("too long" if text is None else "checked")
    assume(text is not None)
    assert text is not None
    assert is_derived(rules, text), (as_lark(rules), text)


@settings(max_examples=60, deadline=None)
@given(rule_sets(), st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 255))
def test_what_a_random_lark_grammar_does_not_derive_is_refused(
    compiler, tokenizer, rules: Rules, seed: int, place: int, byte: int
) -> None:
    """One changed character: what the constraint takes is derived too."""
    text = written(compiler, tokenizer, grammar.lark(as_lark(rules)), seed)
    assume(text)
    assert text
    place %= len(text)
    changed = text[:place] + LETTERS[byte % len(LETTERS)] + text[place + 1 :]
    constraint = compiler.compile(grammar.lark(as_lark(rules)))
    taken = all(constraint.accept(token) for token in tokenizer.encode(changed))
    if taken and (constraint.may_end or constraint.is_finished):
        assert is_derived(rules, changed), (as_lark(rules), changed)
