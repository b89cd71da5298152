"""Where a prompt's KV came from: each of its tokens is counted once, whatever happens later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field

if TYPE_CHECKING:
    from agentrt.types import TierName


@define
class Tally:
    """Prompt tokens by origin. `again` are those that were computed once more, after a preemption,
    output tokens too: they are no part of the prompt's count."""

    tiers: dict[TierName, int] = field(factory=lambda: {"device": 0, "host": 0, "disk": 0})
    computed: int = 0
    again: int = 0

    @property
    def known(self) -> int:
        """Prompt tokens that have an origin."""
        return sum(self.tiers.values()) + self.computed


@define(eq=False)
class Origins:
    """One request's tally; all that it notes goes into its engine's `total` too.

    Invariant: the first `own.known` tokens of the prompt have an origin, the others none yet. A
    request that is preempted begins anew, and what it finds then has its origin already.
    """

    num_prompt_tokens: int
    own: Tally = field(factory=Tally)
    total: Tally = field(factory=Tally)

    def found(self, end: int) -> None:
        """The device has the first `end` tokens."""
        self._from_tier("device", self._fresh(0, end))

    def loaded(self, start: int, end: int, tokens_by_tier: Mapping[TierName, int]) -> None:
        """Tokens [start, end) came up from lower tiers, in the order of `tokens_by_tier`."""
        fresh = self._fresh(start, end)
        for tier, num_tokens in reversed(list(tokens_by_tier.items())):
            self._from_tier(tier, min(num_tokens, fresh))
            fresh -= min(num_tokens, fresh)

    def computed(self, start: int, end: int) -> None:
        """Tokens [start, end) were prefilled."""
        fresh = self._fresh(start, end)
        for tally in (self.own, self.total):
            tally.computed += fresh
            tally.again += end - start - fresh

    def _fresh(self, start: int, end: int) -> int:
        return max(0, min(end, self.num_prompt_tokens) - max(start, self.own.known))

    def _from_tier(self, tier: TierName, num_tokens: int) -> None:
        for tally in (self.own, self.total):
            tally.tiers[tier] += num_tokens
