"""One generation: its tokens, where it stands, and what it owes its caller."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, field

from agentrt.errors import RequestInvalid
from agentrt.origins import Origins
from agentrt.speculate import Pace
from agentrt.token_runs import TokenRuns
from agentrt.types import (
    Completion,
    FinishReason,
    GenerateOptions,
    TierName,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentrt.cache import Lease
    from agentrt.grammar import Constraint
    from agentrt.output import OutputText

TokenArray = "NDArray[np.int32]"
PENDING = -1  # stands for a token that the device has not told yet


def prompt_array(ids: Any, vocab_size: int) -> NDArray[np.int32]:
    """Token ids from a caller, checked. Raises RequestInvalid."""
    try:
        array = np.asarray(ids)
    except ValueError as exc:  # rows of different lengths
        raise RequestInvalid(f"token ids must be a flat sequence of int: {exc}") from exc
    if array.size == 0:
        raise RequestInvalid("the prompt is empty: give at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestInvalid(
            f"token ids must be a flat sequence of int, got {array.dtype}, {array.ndim} dimensions"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise RequestInvalid(f"token id {wrong} is outside the vocabulary [0, {vocab_size})")
    return array.astype(np.int32)


def check_options(options: GenerateOptions, vocab_size: int) -> None:
    """Raise RequestInvalid for what only a model's vocabulary can tell: one request's mistake must
    not reach the step thread, which serves all."""
    for token_id, bias in options.logit_bias.items():
        if token_id >= vocab_size or bias == float("inf"):
            raise RequestInvalid(
                f"logit_bias {{{token_id}: {bias}}}: the id must be below {vocab_size}, the bias "
                "below infinity"
            )
    if options.top_logprobs is not None and options.top_logprobs > vocab_size:
        raise RequestInvalid(
            f"top_logprobs={options.top_logprobs} is more than the vocabulary's {vocab_size}"
        )
    if not isinstance(options.grammar, str | None):
        raise RequestInvalid(
            f"grammar must be a text that agentrt.grammar made, got {options.grammar!r}"
        )


class State(enum.Enum):
    """WAITING -> PREFILL -> DECODE -> FINISHED; a preempted request goes back to WAITING."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@define(eq=False)
class Load:
    """Stored tokens [start, end) of a request, on their way to its blocks."""

    start: int
    end: int
    has_ended: bool = False
    tokens_by_tier: Mapping[TierName, int] | None = None  # what arrived; None if the load failed

    def ended(self, tokens_by_tier: Mapping[TierName, int] | None, now: float) -> None:
        """All of it is in the blocks, or none of it counts."""
        self.has_ended, self.tokens_by_tier = True, tokens_by_tier


@define(eq=False, kw_only=True)
class Request:
    """Owned by the step thread from submission to its last event.

    Invariant: `tokens[:num_tokens]` is prompt + output; the KV of `tokens[:num_computed]` is in
    the lease's blocks. While decoding, num_computed == num_tokens - 1, but for one that asks for no
    token: it ends once its prompt is computed. A lease is held in PREFILL and DECODE only. The last
    `num_pending` tokens are still being sampled by the device, and stand in `tokens` as PENDING;
    between steps all below `num_computed` are known.
    """

    id: str
    options: GenerateOptions
    namespace: str
    sink: Callable[[Any], None]  # takes this request's events, on the step thread
    text: OutputText
    tokens: NDArray[np.int32]  # [prompt + the most output that fits]
    num_prompt_tokens: int
    eos_token_ids: frozenset[int]
    constraint: Constraint | None = None
    submitted_s: float

    # Asked for each token, and so kept: tokens of prompt and output when it runs to its limit, and
    # whether it asks for its prompt's KV alone, and for no token.
    max_total_tokens: int = field(init=False)
    is_prefill: bool = field(init=False)
    # When its agent began to wait: before it was submitted, if a tool ran first.
    waiting_since_s: float = field()
    is_rewritten: bool = False  # whether its prompt rewrites an earlier one of the same session

    state: State = State.WAITING
    num_tokens: int = field()
    num_pending: int = 0
    num_computed: int = 0
    lease: Lease | None = None
    load: Load | None = None
    origins: Origins = field()
    admitted: bool = False
    first_token_s: float | None = None
    logprobs: list[TokenLogprob] = field(factory=list)
    pace: Pace = field(factory=Pace)  # of its drafts
    runs: TokenRuns | None = None  # of its first `num_in_runs` tokens, made at the first guess
    num_in_runs: int = 0
    num_forced: int = 0  # of its newest draft, what a grammar leaves no choice about
    rng: Any = None  # the sampler's generator, made at the first draw

    @max_total_tokens.default
    def _limit(self) -> int:
        return len(self.tokens)

    @is_prefill.default
    def _wants_no_token(self) -> bool:
        return len(self.tokens) == self.num_prompt_tokens

    @num_tokens.default
    def _prompt(self) -> int:
        return self.num_prompt_tokens

    @waiting_since_s.default
    def _submission(self) -> float:
        return self.submitted_s

    @origins.default
    def _no_origins(self) -> Origins:
        return Origins(self.num_prompt_tokens)

    @property
    def is_read(self) -> bool:
        """Whether it is alive and has all that it asks for, which is its prompt's KV."""
        return self.is_prefill and self.state is State.DECODE

    def num_unread(self, num_draft: int) -> int:
        """Of its rows in a step that checks `num_draft` tokens, how many at the front need no
        logits: what comes next is known, and nobody asks how likely it was."""
        options = self.options
        if options.top_logprobs is not None or options.logit_bias:
            return 0
        return min(self.num_forced, num_draft)

    @property
    def known(self) -> NDArray[np.int32]:
        """Prompt and output so far."""
        return self.tokens[: self.num_tokens - self.num_pending]

    @property
    def output(self) -> NDArray[np.int32]:
        """The output so far."""
        return self.tokens[self.num_prompt_tokens : self.num_tokens - self.num_pending]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_pending - self.num_prompt_tokens

    @property
    def is_full(self) -> bool:
        """Whether its last token is sampled, or being sampled."""
        return self.num_tokens >= self.max_total_tokens

    def expect(self) -> None:
        """Make room for a token that the device is about to sample."""
        self.tokens[self.num_tokens] = PENDING
        self.num_tokens += 1
        self.num_pending += 1

    def append(self, token_id: int) -> None:
        """Take a sampled token: the oldest expected one, if any is."""
        if self.num_pending == 0:
            self.expect()
        self.tokens[self.num_tokens - self.num_pending] = token_id
        self.num_pending -= 1

    def drop_pending(self) -> None:
        """Forget the tokens that are expected: the request ends before them."""
        self.num_tokens -= self.num_pending
        self.num_pending = 0

    def limit_reached(self, token_id: int, *, is_newest: bool = True) -> FinishReason | None:
        """Why the request ends with `token_id`, if it does. The grammar stands at the newest token
        of those that a step gave."""
        options = self.options
        is_cut_short = self.constraint is not None and self.constraint.is_cut_short
        if token_id in self.eos_token_ids and not options.ignore_eos:
            return "length" if is_cut_short else "stop"
        if token_id in options.stop_token_ids:
            return "stop"
        if is_newest and self.constraint is not None and self.constraint.is_finished:
            return "length" if is_cut_short else "stop"
        if self.is_full and self.num_pending == 0:
            return "length"
        return None

    def completion(self, reason: FinishReason, now: float) -> Completion:
        """What its caller gets in the end."""
        return Completion(
            request_id=self.id,
            token_ids=tuple(self.output.tolist()),
            text=self.text.text,
            finish_reason=reason,
            usage=self.usage(now),
            logprobs=None if self.options.top_logprobs is None else tuple(self.logprobs),
        )

    def usage(self, now: float) -> Usage:
        first = now if self.first_token_s is None else self.first_token_s
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=dict(self.origins.own.tiers),
            output_tokens=self.num_output_tokens,
            ttft_s=first - self.submitted_s,
            total_s=now - self.submitted_s,
        )
