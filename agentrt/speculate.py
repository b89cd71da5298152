"""Drafts: guesses of a request's next tokens, which the model checks in one forward.

Speculative decoding (Leviathan et al. 2023) without a second model: what a grammar leaves no choice
about, and else what followed the same words before, in the request's own text (prompt lookup,
Saxena 2023) or in what other requests wrote lately (as SuffixDecoding does, Oliaro et al. 2024).
A draft costs rows of a forward; it never changes what is generated: each token is still drawn from
the model's own logits, and the first one that differs from the draft ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import define, evolve, field, frozen

from agentrt.token_runs import TokenRuns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from agentrt.request import Request

MIN_MATCH_TOKENS = 2
MAX_MATCH_TOKENS = 16
MAX_DRAFT_TOKENS = 15
FIRST_DRAFT_TOKENS = 4
MOST_STEPS_WITHOUT = 64
# Steps (a request's share of each) that its wrong guesses may have cost more than its right ones
# have saved before it guesses no more, and what each step makes good of that.
MOST_DEBT_STEPS = 0.5
PAID_STEPS = 0.01
# What was written lately, by namespace: enough for some dozens of turns, searched in 50 us.
RECENT_TOKENS = 16_384


@frozen(kw_only=True)
class DraftLimits:
    """Which drafts pay on a device. Decode rows and drafts are rows of a step alike."""

    guess_rows: int  # a step's rows up to which tokens are guessed
    most_rows: int | None = None  # a step's rows at most, with what a grammar forces; None: any
    min_match_tokens: int = MIN_MATCH_TOKENS  # that must agree before what followed is a guess
    least_tokens: int = 1  # of a guess, where that many followed: fewer would cost as much
    # Right tokens for each decoding request from which on a step with guesses pays: where fewer are
    # expected none guesses, as all would wait for the drafts of a few.
    guesses_a_request: float = 0.0
    # What a draft's row costs, in steps of one row; 0 where drafts cost the same, long or short.
    row_cost: float = 0.0

    def cost_in_shares(self, num_requests: int) -> float:
        """What a draft's row costs, in one request's share of a step of so many: a right token
        saves that share, as the others' steps go on."""
        return self.row_cost / (self.row_cost + (1 - self.row_cost) / num_requests)

    def may_guess(self, num_requests: int) -> bool:
        """Whether so many requests leave room for guesses that pay."""
        room = self.guess_rows - num_requests
        return room > 0 and room >= self.guesses_a_request * num_requests


# SmolLM2 on 2 cores, at 1,400 tokens: one row takes 7.2 ms, four 8.5, eight 12.1, sixteen 20.9; at
# 4,000: 11, 12, 23 and 45.
CPU_LIMITS = DraftLimits(guess_rows=16, row_cost=0.06)
# The same at 600 tokens without an instruction for int8 (Zen 3): 13, 18, 23 and 34 ms.
SLOW_CPU_LIMITS = evolve(CPU_LIMITS, row_cost=0.12)


def continuation(
    text: NDArray[np.int32],
    words: NDArray[np.int32],
    num_tokens: int,
    min_match_tokens: int = MIN_MATCH_TOKENS,
) -> NDArray[np.int32]:
    """What followed in `text` where it agrees longest with the end of `words`; the last such place.

    Empty where fewer than `min_match_tokens` agree. `words` may end with the end of `text`.
    """
    if len(words) < min_match_tokens or len(text) <= min_match_tokens:
        return text[:0]
    ends = np.flatnonzero(text[:-1] == words[-1])  # where the last word stands, and more follows
    for num_matched in range(1, min(MAX_MATCH_TOKENS, len(words))):
        earlier = ends - num_matched
        longer = ends[(earlier >= 0) & (text[earlier] == words[-1 - num_matched])]
        if not len(longer):
            break
        ends = longer
    else:
        num_matched = min(MAX_MATCH_TOKENS, len(words))
    if num_matched < min_match_tokens:
        return text[:0]
    begin = int(ends[-1]) + 1
    return text[begin : begin + num_tokens]


@define
class Pace:
    """How many tokens to guess for one request, from how many guesses were right."""

    num_tokens: int = FIRST_DRAFT_TOKENS
    expected_tokens: int = FIRST_DRAFT_TOKENS  # of them, to be right
    steps_without: int = 0  # still to go
    debt_steps: float = 0.0
    _misses: int = 0  # one after the other

    def next(self) -> int:
        """How many to guess now."""
        self.debt_steps -= PAID_STEPS if self.debt_steps > 0 else 0.0
        if self.steps_without:
            self.steps_without -= 1
            return 0
        return self.num_tokens if self.debt_steps <= MOST_DEBT_STEPS else 0

    def note(
        self, num_drafted: int, num_right: int, least_right: float = 1.0, cost_steps: float = 0.0
    ) -> None:
        """Learn from a draft: longer while all is right; after misses, which are those with fewer
        than `least_right`, seldom, and then with new hope. A right token saves the request's share
        of a step; `cost_steps` is in such shares."""
        self.debt_steps = max(self.debt_steps + cost_steps - num_right, -MOST_DEBT_STEPS)
        if num_right == num_drafted:
            self.num_tokens = self.expected_tokens = min(2 * num_drafted + 1, MAX_DRAFT_TOKENS)
        else:
            self.num_tokens, self.expected_tokens = max(num_right + 1, 2), num_right
        if num_right >= min(least_right, num_drafted):
            self._misses = 0
        else:
            self._misses, self.expected_tokens = self._misses + 1, FIRST_DRAFT_TOKENS
        if self._misses > 1:
            self.steps_without = min(2 ** (self._misses - 1), MOST_STEPS_WITHOUT)


@define
class Recent:
    """What was written lately in one namespace: requests' outputs, one after the other."""

    min_match_tokens: int = MIN_MATCH_TOKENS
    runs: TokenRuns = field(init=False)  # of that many tokens
    _tokens: NDArray[np.int32] = field(
        factory=lambda: np.zeros(2 * RECENT_TOKENS, dtype=np.int32), init=False
    )
    _num_tokens: int = field(default=0, init=False)

    @runs.default
    def _no_runs(self) -> TokenRuns:
        return TokenRuns(self.min_match_tokens, 2 * RECENT_TOKENS)

    @property
    def tokens(self) -> NDArray[np.int32]:
        return self._tokens[: self._num_tokens]

    def add(self, tokens: NDArray[np.int32]) -> None:
        tokens = tokens[-RECENT_TOKENS:]
        if self._num_tokens + len(tokens) > len(self._tokens):
            kept = self.tokens[-RECENT_TOKENS + len(tokens) :].copy()
            self._tokens[: len(kept)], self._num_tokens = kept, len(kept)
            self.runs = self._no_runs()
            self.runs.add(kept)
        before = self._num_tokens
        self._tokens[before : before + len(tokens)] = tokens
        self._num_tokens += len(tokens)
        self.runs.add(self.tokens[max(before - self.min_match_tokens + 1, 0) :])


@define
class Drafter:
    """Drafts for the requests of one engine. Owned by the step thread."""

    limits: DraftLimits = CPU_LIMITS
    num_drafted: int = 0  # tokens
    num_right: int = 0
    _recent: dict[str, Recent] = field(factory=dict, init=False)
    _num_requests: int = field(default=1, init=False)  # of the newest step

    def draft_step(self, requests: Sequence[Request], step_tokens: int) -> list[int]:
        """Drafts for all that decode in a step of at most `step_tokens` rows: how long each is."""
        limits, num_rows = self.limits, len(requests)
        self._num_requests = max(num_rows, 1)
        most_rows = min(step_tokens, limits.most_rows or step_tokens)
        guess_rows = limits.guess_rows if limits.may_guess(num_rows) else 0
        drafts: list[int] = []
        expected = 0
        for request in requests:
            if request.constraint is None and guess_rows <= num_rows:
                drafts.append(0)  # at once: with 32 rows on a GPU a step waits for its plan
                continue
            num_draft = self.draft(request, most_rows - num_rows, guess_rows - num_rows)
            expected += min(num_draft - request.num_forced, request.pace.expected_tokens)
            num_rows += num_draft
            drafts.append(num_draft)
        if expected < limits.guesses_a_request * len(requests):
            return [request.num_forced for request in requests]
        return drafts

    def draft(self, request: Request, room: int, guess_room: int) -> int:
        """Put a draft behind the request's tokens; how long it is: `room` tokens at most, and
        no guess that makes it longer than `guess_room`. What a grammar forces is no guess.

        What the device has not told yet is guessed too, and not counted: should that be wrong, the
        draft is, and costs its rows.
        """
        known = request.known
        room = max(min(room, request.max_total_tokens - request.num_tokens - 1), 0)
        forced: list[int] = []
        if request.constraint is not None:
            assert not request.num_pending
            forced = request.constraint.forced_tokens()[:room]
        put = request.tokens[request.num_tokens :]
        put[: len(forced)] = forced
        num_guessed = 0
        room = min(room, MAX_DRAFT_TOKENS, guess_room) - len(forced)
        if room > 0 and (pace := request.pace.next()):
            words = request.tokens[: len(known) + len(forced)]
            num_tokens = min(room, max(pace, self.limits.least_tokens))
            guess = self._guess(request, words, num_tokens)
            num_guessed = len(guess)
            put[len(forced) : len(forced) + num_guessed] = guess
        num_draft = len(forced) + num_guessed
        if num_guessed and request.constraint is not None:
            num_draft = request.constraint.num_allowed(put[:num_draft].tolist())
        request.num_forced = min(len(forced), num_draft)
        return num_draft

    def checked(self, request: Request, num_draft: int, num_right: int) -> None:
        """Learn how many tokens of a request's newest draft were right."""
        self.num_drafted += num_draft
        self.num_right += num_right
        num_guessed = num_draft - request.num_forced
        if num_guessed > 0:
            num_right = max(num_right - request.num_forced, 0)
            least_right = max(self.limits.guesses_a_request, 1.0)
            cost = num_guessed * self.limits.cost_in_shares(self._num_requests)
            request.pace.note(num_guessed, num_right, least_right, cost)

    def finished(self, request: Request) -> None:
        """Remember what a request wrote."""
        recent = self._recent.get(request.namespace)
        if recent is None:
            self._recent[request.namespace] = recent = Recent(self.limits.min_match_tokens)
        recent.add(request.output)

    def forget(self, namespace: str) -> None:
        """Forget what was written in a namespace."""
        self._recent.pop(namespace, None)

    def _guess(
        self, request: Request, words: NDArray[np.int32], num_tokens: int
    ) -> NDArray[np.int32]:
        """Up to `num_tokens` tokens, behind `words` and what the device has not told yet."""
        least, num_untold = self.limits.min_match_tokens, request.num_pending
        wanted, found = num_untold + num_tokens, words[:0]
        if self._repeats_itself(request, words):
            found = continuation(words, words, wanted, least)
        recent = self._recent.get(request.namespace)
        if not len(found) and recent is not None and recent.runs.may_have(words[-least:]):
            found = continuation(recent.tokens, words, wanted, least)
        elif 0 < len(found) < wanted:
            found = np.resize(found, wanted)  # the text's own end: it repeats itself
        return found[num_untold:]

    def _repeats_itself(self, request: Request, words: NDArray[np.int32]) -> bool:
        """Whether the end of `words` may stand in them before. It is seldom so, and a search costs
        a step of four requests 0.1 ms."""
        least = self.limits.min_match_tokens
        if request.runs is None:
            request.runs = TokenRuns(least, request.max_total_tokens)
        request.runs.add(words[max(request.num_in_runs - least + 1, 0) : -1])
        request.num_in_runs = len(words) - 1
        return request.runs.may_have(words[-least:])
