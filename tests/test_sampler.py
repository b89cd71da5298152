"""Sampling: filters against brute force, seeds, penalties, log-probabilities, masks."""

import math

import numpy as np
import pytest
import torch
from attrs import define
from fakes import make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt import GenerateOptions
from agentrt.errors import GrammarInvalid, RequestInvalid
from agentrt.sampler import filter_logits, sample

VOCAB = 24
rows = st.lists(
    st.floats(-8, 8, width=32), min_size=2, max_size=VOCAB, unique_by=lambda x: round(x, 3)
)


def draw(logits, requests):
    rows = sample(torch.tensor(np.array(logits), dtype=torch.float32), requests)
    return [row for (row,) in rows]


def one(logits, prompt=(1,), output=(), **options):
    """Sample one row for a request that has some output already."""
    request = request_with(prompt, output, **options)
    return draw([logits], [request])[0]


def request_with(prompt=(1,), output=(), **options):
    request = make_request(prompt, len(output) + 64, options=GenerateOptions(**options))
    for token_id in output:
        request.append(token_id)
    return request


@define
class OnlyThese:
    """A grammar that allows the same tokens at every place."""

    allowed: tuple[int, ...]

    def mask(self):
        bits = np.zeros(32, dtype=np.uint8)
        bits[list(self.allowed)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id):
        assert token_id in self.allowed
        return True

    def take(self, token_id):
        self.accept(token_id)
        return token_id


class TooComplex:
    def mask(self):
        raise GrammarInvalid("the grammar cannot be followed: too complex")


# ---- filters


def kept_by(scores, *, top_k=0, top_p=1.0, min_p=0.0):
    """The indices that stay, from the definitions alone."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if top_k:
        order = order[:top_k]

    def probabilities():
        total = sum(math.exp(scores[i]) for i in order)
        return [math.exp(scores[i]) / total for i in order]

    if min_p:
        chances = probabilities()
        order = [i for i, p in zip(order, chances, strict=True) if p >= min_p * chances[0]]
    chances = probabilities()
    before = [sum(chances[:i]) for i in range(len(order))]
    # A sum within rounding of top_p may fall on either side.
    sure = {i for i, p in zip(order, before, strict=True) if p < top_p - 1e-5}
    possible = {i for i, p in zip(order, before, strict=True) if p < top_p + 1e-5}
    return sure, possible


@settings(deadline=None)
@given(rows, st.integers(0, VOCAB + 2), st.floats(0.01, 1), st.sampled_from([0.0, 0.05, 0.37, 1.0]))
def test_filters_keep_what_their_definitions_say(scores, top_k, top_p, min_p):
    options = GenerateOptions(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = filter_logits(torch.tensor(scores, dtype=torch.float32), options)
    kept = set(torch.nonzero(filtered.isfinite()).flatten().tolist())
    sure, possible = kept_by(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    assert int(np.argmax(scores)) in kept
    assert sure - {int(np.argmax(scores))} <= kept <= possible | {int(np.argmax(scores))}
    unchanged = torch.tensor(scores, dtype=torch.float32)[sorted(kept)]
    assert torch.equal(filtered[sorted(kept)], unchanged)


def test_tiny_top_p_and_full_min_p_leave_the_best_token():
    scores = torch.tensor([0.0, 2.0, 1.0])
    for options in (GenerateOptions(top_p=1e-300), GenerateOptions(min_p=1.0)):
        assert filter_logits(scores, options).isfinite().tolist() == [False, True, False]


# ---- draws


def test_greedy_takes_the_largest_whatever_the_seed():
    assert one([0, 3, 1], seed=4) == (1, None)
    assert one([0, 3, 1], temperature=0.0, top_logprobs=0)[0] == 1


def test_draws_follow_the_distribution():
    """Chi-square over 4,000 draws with one seed; 0.1 % critical value for 5 degrees is 20.5."""
    logits, temperature, num_draws = [1.0, 0.0, -1.0, 2.0, 0.5, -0.5], 1.7, 4000
    request = request_with(temperature=temperature, seed=11)
    counts = np.zeros(len(logits))
    for _ in range(num_draws):
        counts[draw([logits], [request])[0][0]] += 1
    expected = np.exp(np.array(logits) / temperature)
    expected *= num_draws / expected.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_filtered_tokens_are_never_drawn():
    request = request_with(temperature=5.0, top_k=2, seed=0)
    drawn = {draw([[0.0, 1.0, 2.0, 3.0]], [request])[0][0] for _ in range(200)}
    assert drawn == {2, 3}


def test_a_seed_repeats_and_does_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((20, VOCAB))

    def draws(batch_size, place):
        requests = [request_with(temperature=1.0, seed=100 + i) for i in range(batch_size)]
        requests[place] = request_with(temperature=1.0, seed=7)
        got = []
        for logits in steps:
            batch = rng.standard_normal((batch_size, VOCAB))
            batch[place] = logits
            got.append(draw(batch, requests)[place][0])
        return got

    alone = draws(1, 0)
    assert len(set(alone)) > 5
    assert draws(1, 0) == draws(4, 2) == draws(3, 0) == alone


def test_without_a_seed_requests_differ():
    logits = [0.0] * VOCAB

    def ten():
        request = request_with(temperature=1.0)
        return [draw([logits], [request])[0][0] for _ in range(10)]

    assert ten() != ten()


def test_a_mixed_batch_gives_each_row_its_own_options():
    logits = [[0.0, 5.0, 1.0]] * 3
    requests = [
        request_with(),
        request_with(logit_bias={2: 100.0}),
        request_with(temperature=1.0, top_k=1),
    ]
    assert [token for token, _ in draw(logits, requests)] == [1, 2, 1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-8])
def test_a_tiny_temperature_is_greedy_not_an_overflow(temperature):
    assert one([30.0, 31.0, 29.0], temperature=temperature)[0] == 1


# ---- penalties and bias


def test_repetition_penalty_divides_or_multiplies_what_was_seen():
    # 0 and 1 are in the prompt, 2 in the output, 3 nowhere
    scores = top_of([3.0, -1.0, 2.0, 0.5], (0, 1), (2,), repetition_penalty=2.0)
    assert scores == pytest.approx(log_softmax([1.5, -2.0, 1.0, 0.5]), abs=1e-5)


def test_presence_and_frequency_count_the_output_alone():
    scores = top_of(
        [1.0, 1.0, 1.0], (0, 0), (1, 1, 2), presence_penalty=0.5, frequency_penalty=0.25
    )
    assert scores == pytest.approx(log_softmax([1.0, 0.0, 0.25]), abs=1e-5)


def test_logit_bias_is_added_and_minus_infinity_forbids():
    assert one([5.0, 1.0, 0.0], logit_bias={2: 6.0})[0] == 2
    assert one([5.0, 1.0, 0.0], logit_bias={0: -math.inf})[0] == 1


def top_of(logits, prompt, output, **options):
    """Log-probabilities of all tokens, in the order of their ids."""
    _, logprob = one(logits, prompt, output, top_logprobs=len(logits), **options)
    return [value for _, value in sorted(logprob.top)]


def log_softmax(logits):
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1).tolist()


# ---- log-probabilities


@settings(deadline=None)
@given(rows)
def test_logprobs_are_a_distribution_in_order(logits):
    token, logprob = one(logits, top_logprobs=len(logits))
    values = [value for _, value in logprob.top]
    assert sum(math.exp(value) for value in values) == pytest.approx(1, abs=1e-4)
    assert values == sorted(values, reverse=True)
    assert logprob.top[0] == (token, logprob.logprob)
    assert values == pytest.approx(sorted(log_softmax(logits), reverse=True), abs=1e-4)


def test_logprobs_are_those_before_temperature_and_filters():
    logits = [2.0, 1.0, 0.0]
    token, logprob = one(logits, temperature=0.3, top_k=1, top_logprobs=3)
    assert token == logprob.token_id == 0
    assert [value for _, value in logprob.top] == pytest.approx(log_softmax(logits), abs=1e-5)


def test_zero_top_logprobs_gives_the_token_alone():
    token, logprob = one([1.0, 2.0], top_logprobs=0)
    assert (token, logprob.token_id, logprob.top) == (1, 1, ())


# ---- grammars, and requests that cannot be sampled


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_only_tokens_of_the_grammar_are_sampled(temperature):
    request = request_with(temperature=temperature, seed=3)
    request.constraint = OnlyThese((4, 9))
    logits = [float(i) for i in range(VOCAB)]
    drawn = {draw([logits], [request])[0][0] for _ in range(50)}
    assert drawn <= {4, 9}
    assert 9 in drawn


def test_ids_beyond_the_grammars_vocabulary_are_forbidden():
    request = request_with()
    request.constraint = OnlyThese((5,))
    logits = [0.0] * 40
    logits[39] = 9.0
    assert draw([logits], [request])[0][0] == 5


def test_a_row_without_any_token_left_is_that_requests_error():
    nothing = dict.fromkeys(range(3), -math.inf)
    for temperature in (0.0, 1.0):
        bad = request_with(logit_bias=nothing, temperature=temperature)
        results = draw([[0.0, 1.0, 2.0]] * 2, [bad, request_with()])
        assert isinstance(results[0], RequestInvalid)
        assert "logit_bias" in str(results[0])
        assert results[1] == (2, None)


def test_a_grammar_that_fails_is_that_requests_error():
    bad = request_with()
    bad.constraint = TooComplex()
    results = draw([[0.0, 1.0]] * 2, [bad, request_with()])
    assert isinstance(results[0], GrammarInvalid)
    assert results[1] == (1, None)
