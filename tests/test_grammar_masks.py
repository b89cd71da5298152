"""Masks that are filled beside the forward are those that the sampler would ask for itself."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLExecutor

from agentrt import Completion, GenerateOptions, grammar
from agentrt.errors import EngineFailed, GrammarInvalid
from agentrt.grammar import Constraint, GrammarCompiler, fill_masks
from agentrt.grammar_masks import MaskThread
from agentrt.sampler import forbid, forbid_together, forbidden_there

GRAMMARS = [
    grammar.regex("[a-c]{0,6}d?"),
    grammar.choice(["hello world", "hello you", "no"]),
    grammar.json_schema({"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 3}),
]


def step_by_step(constraint: Constraint, draft: list[int]) -> list[np.ndarray]:
    """The masks of a draft as far as it is allowed, each asked for when it is needed."""
    masks, taken = [constraint.mask()], 0
    for token in draft:
        if constraint.is_finished or not constraint.accept(token):
            break
        taken += 1
        masks.append(constraint.mask())
    constraint.rollback(taken)
    return masks


def walked(compiler: GrammarCompiler, text: str, num_tokens: int, seed: int) -> tuple[Any, list]:
    """A place in a grammar, and a draft from there that may go wrong in the end."""
    chance, constraint = np.random.default_rng(seed), compiler.compile(text)

    def next_token(at: Constraint) -> int:
        bits = np.unpackbits(at.mask().view(np.uint8), bitorder="little")
        return int(chance.choice(np.flatnonzero(bits)))

    for _ in range(num_tokens):
        if not constraint.is_finished:
            constraint.accept(next_token(constraint))
    ahead, draft = constraint.fork(), []
    for _ in range(int(chance.integers(0, 5))):
        if not ahead.is_finished:
            draft.append(next_token(ahead))
            ahead.accept(draft[-1])
    return constraint, [*draft, *chance.integers(0, 250, chance.integers(0, 2)).tolist()]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.none() | st.tuples(st.sampled_from(GRAMMARS), st.integers(0, 4), st.integers(0, 999)),
        min_size=1,
        max_size=5,
    ).filter(any)
)
def test_they_are_those_of_one_step_after_the_other(compiler: GrammarCompiler, asked: list) -> None:
    rows: list[tuple[Constraint | None, list[int]]] = [
        (None, [7]) if each is None else walked(compiler, *each) for each in asked
    ]
    before = [None if each is None else each.mask() for each, _ in rows]
    masks = iter(fill_masks(LLExecutor(), rows))
    for constraint, draft in rows:
        got = [next(masks) for _ in range(1 + len(draft))]
        if constraint is None:
            assert got == [None, None]
            continue
        wanted = step_by_step(constraint, draft)
        for one, want in zip(got, wanted, strict=False):
            # Behind the end of a text nothing may be filled; the sampler then asks the grammar.
            assert one is None or np.array_equal(one, want)
        assert got[0] is not None
        num_filled = sum(one is not None for one in got)
        assert num_filled >= len(wanted) - 1
        assert all(one is None for one in got[len(wanted) :])
    after = [None if each is None else each.mask() for each, _ in rows]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)


def test_the_thread_begins_with_the_first_grammar_and_ends_when_it_is_closed(compiler) -> None:
    masks = MaskThread()
    assert masks.begin([(None, []), (None, [4])]) is None
    assert masks._thread is None
    constraint = compiler.compile(GRAMMARS[0])
    filling = masks.begin([(None, []), (constraint, [])])
    assert filling is not None
    nothing, mask = filling.masks()
    assert nothing is None
    assert np.array_equal(mask, constraint.mask())
    thread = masks._thread
    masks.close()
    masks.close()
    assert thread is not None
    assert not thread.is_alive()


async def test_a_failure_on_the_thread_fails_whoever_waits(
    tokenizer, compiler, monkeypatch
) -> None:
    async with FakeEngine(tokenizer=tokenizer, checked=False) as engine:
        made = compiler.compile(GRAMMARS[0])
        made._matcher = "no matcher"

        async def broken(_: object) -> Any:
            return made

        monkeypatch.setattr(type(engine.chat), "constraint", lambda *_: broken(None))
        with pytest.raises(EngineFailed, match="TypeError"):
            await engine.generate([5, 6, 7], GenerateOptions(max_tokens=4, grammar=GRAMMARS[0]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 170), st.integers(0, 999))
def test_what_a_mask_lacks_is_forbidden_on_any_device(num_words, vocab_size, seed) -> None:
    chance = np.random.default_rng(seed)
    mask = chance.integers(-(2**31), 2**31 - 1, num_words).astype(np.int32)
    allowed = [
        token < 32 * num_words and bool(mask[token // 32] >> token % 32 & 1)
        for token in range(vocab_size)
    ]
    row = torch.ones(vocab_size)
    forbid(row, mask)
    assert row.tolist() == [1.0 if each else float("-inf") for each in allowed]
    there = forbidden_there(mask, torch.device("cpu"))
    shown = min(vocab_size, 32 * num_words)
    assert there[:shown].tolist() == [not each for each in allowed[:shown]]


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(1, 6),
    num_words=st.integers(1, 5),
    vocab_size=st.integers(1, 170),
    seed=st.integers(0, 999),
)
def test_rows_are_masked_together_as_alone(num_rows, num_words, vocab_size, seed) -> None:
    chance = np.random.default_rng(seed)
    masks = chance.integers(-(2**31), 2**31 - 1, (num_rows, num_words)).astype(np.int32)
    rows = chance.permutation(num_rows + 2)[:num_rows].tolist()
    alone = torch.randn(num_rows + 2, vocab_size)
    together = alone.clone()
    for row, mask in zip(rows, masks, strict=True):
        forbid(alone[row], mask)
    forbid_together(together, rows, masks)
    assert torch.equal(alone, together)


async def test_a_grammar_too_complex_to_follow_fails_its_caller_alone(tokenizer) -> None:
    many = " | ".join(f'"x" b{n}' for n in range(3000))
    rules = "\n".join(f'b{n}: "y{n}"' for n in range(3000))
    bad = GenerateOptions(max_tokens=8, grammar=f"start: a\na: {many}\n{rules}\n")
    good = GenerateOptions(max_tokens=8, grammar=grammar.regex("[a-c]{8}"))
    async with FakeEngine(tokenizer=tokenizer) as engine:
        failing, fine = await asyncio.gather(
            engine.generate([5, 6, 7], bad),
            engine.generate([5, 6, 8], good),
            return_exceptions=True,
        )
        assert isinstance(failing, GrammarInvalid)
        assert "cannot be followed" in str(failing)
        assert isinstance(fine, Completion)
        assert len(fine.text) == 8
        assert await engine.leased_blocks() == 0
