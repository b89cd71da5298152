"""Tokens as OpenAI's answers show them: log-probabilities and usage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen

from agentrt.tokenizer import Tokenizer
from agentrt.types import Completion, TokenLogprob


def shown_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """One entry a token, with the best ones beside it."""
    return [
        {
            **_shown(tokenizer, each.token_id, each.logprob),
            "top_logprobs": [_shown(tokenizer, token, logprob) for token, logprob in each.top],
        }
        for each in logprobs
    ]


def _shown(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    # JSON has no infinity: OpenAI's own stand-in for what can never come.
    logprob = max(logprob, -9999.0)
    raw = list(tokenizer.token_bytes(token_id))
    return {"token": tokenizer.decode([token_id]), "bytes": raw, "logprob": logprob}


@frozen(kw_only=True)
class Tally:
    """The tokens of one answer. What was cached of its prompt is as its first choice found it."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


def num_cached_tokens(completion: Completion | None) -> int:
    """Prompt tokens that were not computed for this answer, from whichever tier they came. Of one
    that a guard ended, it is not known."""
    return 0 if completion is None else sum(completion.usage.cached_tokens.values())
