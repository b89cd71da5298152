"""Drafts change how many steps a generation takes, and nothing that it says."""

import asyncio
from collections import Counter

import numpy as np
import pytest
import torch
from fakes import EOS, FakeEngine, logits_after, make_request, until
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt import GenerateOptions
from agentrt.grammar import regex
from agentrt.speculate import (
    CPU_LIMITS,
    MAX_DRAFT_TOKENS,
    MIN_MATCH_TOKENS,
    Drafter,
    DraftLimits,
    Pace,
    Recent,
    continuation,
)

ORDERS = [regex("<order id=[0-9]{3}" + end) for end in (">done", "[ab]", "done?", "")]
small = st.lists(st.integers(0, 3), max_size=40)


def array(tokens):
    return np.array(tokens, dtype=np.int32)


@settings(max_examples=300, deadline=None)
@given(text=small, words=small, num_tokens=st.integers(1, 6), own=st.booleans())
def test_a_continuation_follows_the_longest_agreement(text, words, num_tokens, own):
    """Against a plain search of every place."""
    text = words if own else text
    best, expected = 0, []
    for end in range(len(text) - 1):
        agree = 0
        while agree < min(len(words), end + 1) and text[end - agree] == words[-1 - agree]:
            agree += 1
        if agree >= max(best, MIN_MATCH_TOKENS):
            best, expected = agree, text[end + 1 : end + 1 + num_tokens]
    got = continuation(array(text), array(words), num_tokens).tolist()
    if best <= 16:  # longer agreements count as equal
        assert got == expected


def test_the_pace_follows_what_was_right():
    pace = Pace()
    assert pace.next() == 4
    pace.note(4, 4)
    assert pace.next() == 9
    pace.note(9, 9)
    assert pace.next() == MAX_DRAFT_TOKENS
    pace.note(15, 2)
    assert pace.next() == 3
    for _ in range(3):
        pace.note(3, 0)
    assert [pace.next() for _ in range(5)] == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("row_cost", [0.0, 0.06, 0.3])
@pytest.mark.parametrize("num_requests", [1, 2, 4, 16])
def test_a_right_token_saves_its_requests_share_of_a_step(row_cost, num_requests):
    """In steps of one row: what a step of so many rows costs, divided among them."""
    step = 1 - row_cost + num_requests * row_cost
    cost = DraftLimits(guess_rows=16, row_cost=row_cost).cost_in_shares(num_requests)
    assert cost * step / num_requests == pytest.approx(row_cost)


@pytest.mark.parametrize("row_cost", [0.06, 0.3])
def test_wrong_guesses_cost_few_steps(row_cost):
    """No more than a debt, the guess that makes it, and a hundredth of all steps."""
    pace, cost = Pace(), 0.0
    for steps in range(1, 500):
        if num_guessed := pace.next():
            cost += row_cost * num_guessed
            pace.note(num_guessed, 0, cost_steps=row_cost * num_guessed)
        assert cost <= 0.5 + row_cost * 4 + 0.01 * steps
    assert cost > 0.5
    for _ in range(300):
        pace.next()
    pace.note(4, 4, cost_steps=row_cost * 4)  # right ones make good what they cost
    assert pace.debt_steps <= 0


def test_drafts_that_did_not_pay_are_misses():
    """One of two wanted right again and again: less and less often, and each time with hope."""
    pace, waited = Pace(), []
    for _ in range(9):
        assert pace.expected_tokens == 4
        pace.note(4, 1, least_right=2.0)
        steps = 0
        while not pace.next():
            steps += 1
        waited.append(steps)
    assert waited == [0, 2, 4, 8, 16, 32, 64, 64, 64]
    pace.note(4, 3, least_right=2.0)
    assert (pace.expected_tokens, pace.num_tokens) == (3, 4)
    pace.note(4, 4, least_right=2.0)
    assert pace.expected_tokens == 9
    pace.note(1, 1, least_right=2.0)  # there was no room for more
    assert pace.next()


class Forces:
    """A grammar that leaves one text only, and takes any other too."""

    def __init__(self, tokens):
        self.tokens = tokens

    def forced_tokens(self):
        return self.tokens

    def num_allowed(self, tokens):
        return len(tokens)


def drafts_of(limits, *, forced=(), num_plain=1, step_tokens=100):
    """Of a request whose grammar forces tokens, and some whose text repeats itself."""
    requests = [make_request([5 + n, 7, 8] * 4, 60) for n in range(num_plain)]
    if forced:
        requests.insert(0, make_request([9], 60))
        requests[0].constraint = Forces(list(forced))
    drafter = Drafter(limits)
    return drafter.draft_step(requests, step_tokens)


def test_limits_say_which_drafts_are_made():
    forced = range(30)
    assert drafts_of(CPU_LIMITS) == [4]
    assert drafts_of(CPU_LIMITS, num_plain=5) == [4, 4, 3, 0, 0]  # 16 rows
    assert drafts_of(CPU_LIMITS, forced=forced) == [30, 0]
    assert drafts_of(CPU_LIMITS, forced=forced, step_tokens=20) == [18, 0]
    wide = DraftLimits(guess_rows=64, most_rows=24, least_tokens=7)
    assert drafts_of(wide) == [7]
    assert drafts_of(wide, num_plain=4) == [7, 7, 6, 0]  # 24 rows
    assert drafts_of(wide, forced=forced, num_plain=3) == [20, 0, 0, 0]
    assert drafts_of(DraftLimits(guess_rows=64, min_match_tokens=20)) == [0]


def test_guesses_of_a_few_are_dropped_and_what_a_grammar_forces_is_not():
    """Four tokens are expected of each of two that repeat themselves: with a third, they are fewer
    than three for each."""
    limits = DraftLimits(guess_rows=64, guesses_a_request=3.0)
    assert drafts_of(limits, num_plain=2) == [4, 4]
    assert drafts_of(limits, forced=[1, 2], num_plain=2) == [2, 0, 0]
    assert limits.may_guess(16)
    assert not limits.may_guess(17)
    assert not CPU_LIMITS.may_guess(16)


def test_behind_an_untold_token_the_guess_begins_one_later():
    drafter = Drafter(DraftLimits(guess_rows=16))
    for period in (1, 3, 5):
        text = [10 + n % period for n in range(20)]
        request = make_request(text, 20)
        request.expect()
        assert drafter.draft_step([request], 64) == [4]
        got = request.tokens[request.num_tokens :][:4].tolist()
        assert got == [10 + n % period for n in range(21, 25)]


def test_recent_text_keeps_the_newest():
    recent = Recent()
    for start in range(0, 100_000, 500):
        recent.add(np.arange(start, start + 500, dtype=np.int32))
    assert recent.tokens[-1] == 99_999
    assert (np.diff(recent.tokens) == 1).all()
    assert 16_384 <= len(recent.tokens) <= 2 * 16_384
    for end in (2, 500, 501, len(recent.tokens)):  # a border between outputs is none of its own
        assert recent.runs.may_have(recent.tokens[end - 2 : end])


@settings(max_examples=200, deadline=None)
@given(prompt=st.lists(st.integers(0, 3), min_size=1, max_size=40), others=small, grows=small)
def test_a_guess_is_what_a_search_finds(prompt, others, grows):
    """What says that there is nothing to find never hides something, however the text grew."""
    drafter = Drafter()
    if others:
        written = make_request([0], len(others))
        for token in others:
            written.append(token)
        drafter.finished(written)
    request = make_request(prompt, 60)
    for token in [*grows, None]:
        words = request.known
        expected = continuation(words, words, 4)
        if len(expected):
            expected = np.resize(expected, 4)
        elif others:
            expected = continuation(array(others), words, 4)
        assert drafter._guess(request, words, 4).tolist() == expected.tolist()
        if token is not None:
            request.append(token)


class Loops:
    """A model that repeats its own text: the token behind t is always (t + 1) % period."""

    def __init__(self, period):
        self.period = period

    def __call__(self, request, num_output_tokens):
        prompt = request.tokens[: request.num_prompt_tokens]
        return 1 + int(prompt[-1] + num_output_tokens) % self.period


async def generate(prompts, *, speculation, script=None, vocab_size=None, **options):
    """(completions, steps)."""
    async with FakeEngine(num_blocks=128, speculation=speculation, vocab_size=vocab_size) as engine:
        if script is not None:
            engine.runner.script = script
        wanted = GenerateOptions(**{"max_tokens": 40, "ignore_eos": True, **options})
        engine.gate.close()
        asked = asyncio.gather(*(engine.generate(prompt, wanted) for prompt in prompts))
        await until(lambda: engine._open.loop.num_queued == len(prompts))
        engine.gate.open()  # all begin in the same step
        done = await asked
        await engine.check()
        return done, engine.stats()


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"top_logprobs": 2}])
async def test_the_same_tokens_in_fewer_steps(num_prompts, options):
    prompts = [[1 + n, 2, 3] for n in range(num_prompts)]
    plain, before = await generate(prompts, speculation=False, script=Loops(5), **options)
    drafted, after = await generate(prompts, speculation=True, script=Loops(5), **options)
    for one, other in zip(plain, drafted, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
    assert after.steps < before.steps / 2
    assert after.accepted_tokens > 20
    assert before.drafted_tokens == 0


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
async def test_noise_is_the_same_noise(temperature):
    """Few words, in no order: drafts are mostly wrong, and the tokens those of the model alone."""
    prompt = [3, 4, 3, 4, 3]
    options = {"temperature": temperature, "seed": 11, "vocab_size": 6, "max_tokens": 150}
    plain, _ = await generate([prompt], speculation=False, **options)
    drafted, stats = await generate([prompt], speculation=True, **options)
    assert plain[0].token_ids == drafted[0].token_ids
    assert stats.accepted_tokens < stats.drafted_tokens / 2


async def test_drafts_end_where_the_request_does():
    """At its limit, at a stop token, at the end of the turn."""
    for length in range(1, 24):
        done, _ = await generate([[1, 2, 3]], speculation=True, script=Loops(5), max_tokens=length)
        assert done[0].token_ids == tuple(1 + (3 + n) % 5 for n in range(length))
    options = {"stop_token_ids": frozenset({2}), "max_tokens": 200}
    prompt = [1, 2, 3, 4, 5] * 3
    done, _ = await generate([prompt], speculation=True, script=Loops(5), **options)
    assert done[0].token_ids == (1, 2)
    assert done[0].finish_reason == "stop"
    done, _ = await generate(
        [[1, EOS, 3, 1]], speculation=True, script=lambda *_: EOS, ignore_eos=False
    )
    assert done[0].token_ids == (EOS,)


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 1.0}, {"top_logprobs": 2}, {"logit_bias": {7: 1.0}}]
)
@pytest.mark.parametrize("grammar", ORDERS)
async def test_a_grammar_ends_at_the_same_token(tokenizer, more, grammar):
    """Also where what it forces is all right, and the row behind could give one token more. No
    logits are computed for what is forced, unless somebody asks for them."""
    options = GenerateOptions(max_tokens=40, seed=3, grammar=grammar, **more)
    done, num_logits = [], []
    for speculation in (False, True):
        async with FakeEngine(
            num_blocks=128, tokenizer=tokenizer, speculation=speculation
        ) as engine:
            done.append(await engine.generate("x", options))
            num_logits.append(engine.runner.num_logits)
            stats = engine.stats()
    assert done[0].token_ids == done[1].token_ids
    assert done[0].logprobs == done[1].logprobs
    assert done[0].finish_reason == done[1].finish_reason == "stop"
    assert stats.accepted_tokens > 5
    if "top_logprobs" in more or "logit_bias" in more:
        assert num_logits[1] >= num_logits[0]
    else:
        assert num_logits[1] <= num_logits[0] - 5


async def test_the_distribution_stays():
    """400 draws of the second token, with a draft that is mostly wrong, against as many without."""
    prompt = [7, 8, 7, 8, 7]
    counts = []
    for speculation in (False, True):
        async with FakeEngine(num_blocks=256, speculation=speculation) as engine:
            completions = await asyncio.gather(
                *(
                    engine.generate(
                        prompt, GenerateOptions(max_tokens=3, temperature=0.5, seed=seed)
                    )
                    for seed in range(400)
                )
            )
        counts.append(Counter(done.token_ids for done in completions))
    assert counts[0] == counts[1]


FEW_WORDS, TEMPERATURE, NUM_DRAWN, NUM_REQUESTS = 5, 0.7, 2, 800


def true_distribution(prompt):
    """How likely the model's next NUM_DRAWN tokens are, from its logits alone."""
    likely = {(): 1.0}
    for _ in range(NUM_DRAWN):
        longer = {}
        for words, chance in likely.items():
            logits = logits_after([*prompt, *words], FEW_WORDS).astype(np.float64)
            scores = np.exp(logits / TEMPERATURE)
            for token, share in enumerate(scores / scores.sum()):
                longer[(*words, token)] = chance * float(share)
        likely = longer
    return likely


def chance_of(counts, likely):
    """The p-value of Pearson's test; cells of less than 5 are taken together."""
    total = sum(counts.values())
    cells = [(counts[words], chance * total) for words, chance in likely.items()]
    small = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    cells.append((sum(seen for seen, _ in small), sum(wanted for _, wanted in small)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=freedom.dtype)))


async def test_tokens_behind_drafts_have_the_models_own_distribution():
    """Of each pair of tokens, against what the logits say; drafts are right and wrong by turns."""
    prompt = [3, 4, 3, 4, 3]
    async with FakeEngine(num_blocks=256, vocab_size=FEW_WORDS, checked=False) as engine:
        options = [
            GenerateOptions(
                max_tokens=NUM_DRAWN + 2, temperature=TEMPERATURE, seed=seed, ignore_eos=True
            )
            for seed in range(NUM_REQUESTS)
        ]
        done = await asyncio.gather(*(engine.generate(prompt, each) for each in options))
        stats = engine.stats()
    assert NUM_REQUESTS / 4 < stats.accepted_tokens < stats.drafted_tokens / 2
    counts = Counter(one.token_ids[:NUM_DRAWN] for one in done)
    assert chance_of(counts, true_distribution(prompt)) > 0.001


@pytest.mark.parametrize("guess", range(FEW_WORDS))
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_that_test_finds_a_draft_that_is_believed_too_often(share, guess):
    """As many draws, the second of which is the same guess in this share of the cases."""
    likely, chance = true_distribution([3, 4, 3, 4, 3]), np.random.default_rng(guess)
    words = list(likely)
    drawn = chance.choice(len(words), NUM_REQUESTS, p=np.array(list(likely.values())))
    counts = Counter(
        (words[index][0], guess) if chance.random() < share else words[index] for index in drawn
    )
    assert (chance_of(counts, likely) < 0.001) == (share > 0)


async def test_a_small_pool_preempts_nobody_for_a_draft():
    async with FakeEngine(num_blocks=12, speculation=True) as engine:
        engine.runner.script = Loops(5)
        options = GenerateOptions(max_tokens=16, ignore_eos=True)
        prompts = [[1 + n, 2, 3] for n in range(2)]
        await asyncio.gather(*(engine.generate(prompt, options) for prompt in prompts))
        await engine.check()
        assert engine.stats().preempted == 0
