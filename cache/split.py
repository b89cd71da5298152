"""Load or recompute: how much of a stored prefix to load, from measured rates. Pure."""

from collections.abc import Sequence

from attrs import define, field, frozen

KNEE_TOKENS = 4096.0  # here attention over the context costs as much as a token's projections
SMOOTHING = 0.2  # weight of the newest measurement
LEAST_MEASURED_TOKENS = 32  # a step of fewer prefill tokens says little about the rate


@define
class Rates:
    """What moving and computing KV costs here: exponential means of what was measured.

    The first values are guesses that the first measurements replace.
    """

    compute_s_per_token: float  # at depth 0
    load_s_per_byte: dict[str, float] = field(factory=lambda: {"host": 1 / 4e9, "disk": 1 / 1e9})
    latency_s: float = 2e-3  # of any load: two hand-overs between threads
    _seen: set[str] = field(factory=set)

    def note_compute(self, num_tokens: int, cost_tokens: float, seconds: float) -> None:
        """A step computed tokens whose cost is that of `cost_tokens` at depth 0."""
        if num_tokens >= LEAST_MEASURED_TOKENS:
            self.compute_s_per_token = self._mean(
                "compute", self.compute_s_per_token, seconds / cost_tokens
            )

    def note_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A load from one tier moved so many bytes."""
        if num_bytes:
            old = self.load_s_per_byte[tier]
            self.load_s_per_byte[tier] = self._mean(tier, old, seconds / num_bytes)

    def _mean(self, name: str, old: float, new: float) -> float:
        if name not in self._seen:
            self._seen.add(name)
            return new
        return old + SMOOTHING * (new - old)


def cost_tokens(start: int, end: int) -> float:
    """The cost of computing tokens [start, end), in tokens at depth 0."""
    return (end - start) * (1 + (start + end) / 2 / KNEE_TOKENS)


@frozen
class Piece:
    """Stored tokens [start, end) in one tier."""

    start: int
    end: int
    tier: str


def load_from(
    have_tokens: int, pieces: Sequence[Piece], token_bytes: int, rates: Rates, *, overlaps: bool
) -> int | None:
    """Where the part to load begins; the tokens from `have_tokens` up to there are computed.

    `pieces` are consecutive and reach beyond `have_tokens`. Where compute and copies overlap (a
    GPU), both go on at once and the longer counts; else they add up. None: compute all of it.
    """
    end = pieces[-1].end
    best, best_s = None, compute_s(have_tokens, end, rates)
    load_s = rates.latency_s
    for piece in reversed(pieces):
        if piece.end <= have_tokens:
            break
        start = max(piece.start, have_tokens)
        load_s += (piece.end - start) * token_bytes * rates.load_s_per_byte[piece.tier]
        before_s = compute_s(have_tokens, start, rates)
        total_s = max(before_s, load_s) if overlaps else before_s + load_s
        if total_s < best_s:
            best, best_s = start, total_s
    return best


def compute_s(start: int, end: int, rates: Rates) -> float:
    """Seconds to compute tokens [start, end)."""
    return cost_tokens(start, end) * rates.compute_s_per_token
