"""How long each tool takes: learnt from what was seen, with a prior for what was not."""

import math
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from typing import final

from attrs import field, frozen
from attrs.validators import gt

from agentrt.errors import CacheCorrupt

MAX_TOOLS = 256
MAX_OBSERVATIONS = 64  # of each tool; older ones are forgotten, so that a changed tool is learnt
PRIOR_OBSERVATIONS = 1.0  # how many the belief about a tool counts before it was ever seen
SHORTEST_S, LONGEST_S = 1e-6, 1e12
NUM_HALVINGS = 48  # of the range between their logarithms: the result is exact to 1e-12 of itself


@frozen(kw_only=True)
class LatencyPrior:
    """A log-normal distribution of latencies.

    Log-normal, as a latency is a product of many factors (size, distance, load) rather than a sum;
    and for its tail: what has taken long already is likely to take about as long again.
    """

    median_s: float = field(default=1.0, validator=gt(0.0))
    spread: float = field(default=1.5, validator=gt(0.0))  # standard deviation of the logarithm

    def survival(self, seconds: float) -> float:
        """The chance to take longer than `seconds`."""
        if seconds <= 0.0:
            return 1.0
        return 0.5 * math.erfc(math.log(seconds / self.median_s) / (self.spread * math.sqrt(2)))


class _Sample:
    """The last observations of one tool.

    Invariant: `_ordered` is `_recent` sorted; neither is longer than MAX_OBSERVATIONS.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, seconds: float) -> None:
        if len(self._recent) == MAX_OBSERVATIONS:
            del self._ordered[bisect_right(self._ordered, self._recent.popleft()) - 1]
        self._recent.append(seconds)
        insort(self._ordered, seconds)

    def survival(self, seconds: float, believed: float) -> float:
        """The chance to take longer: what was seen, and `believed` as PRIOR_OBSERVATIONS more."""
        num_longer = len(self._ordered) - bisect_right(self._ordered, seconds)
        num_all = len(self._ordered) + PRIOR_OBSERVATIONS
        return (num_longer + PRIOR_OBSERVATIONS * believed) / num_all


@final
class ToolLatencies:
    """Predicts how long a tool will still take, by quantiles of what it took before.

    A tool's distribution is that of its own last observations, mixed with a little of what is
    believed of any tool: the observations of all, mixed with the prior likewise. Quantiles of
    observations need no shape and shrug off outliers. Without a clock: the caller measures.

    State: at most MAX_TOOLS samples, those longest unobserved forgotten first.
    """

    def __init__(self, prior: LatencyPrior | None = None) -> None:
        self._prior = LatencyPrior() if prior is None else prior
        self._all = _Sample()
        self._samples: OrderedDict[str, _Sample] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ToolLatencies {len(self._samples)} tools>"

    def observe(self, name: str, seconds: float) -> None:
        """Note that the tool `name` took `seconds`. ValueError for what no clock can measure."""
        if not 0.0 <= seconds < math.inf:
            raise ValueError(f"{seconds=} of tool {name!r} must be finite and not negative")
        if name not in self._samples and len(self._samples) == MAX_TOOLS:
            self._samples.popitem(last=False)
        self._samples.setdefault(name, _Sample()).add(seconds)
        self._samples.move_to_end(name)
        self._all.add(seconds)

    def expected(self, name: str, quantile: float = 0.5, elapsed_s: float = 0.0) -> float:
        """Seconds that the tool will still take, at most with chance `quantile`.

        Given that it runs for `elapsed_s` already; what was over sooner does not count then.
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"{quantile=} must lie between 0 and 1")
        elapsed_s = min(max(0.0, elapsed_s), LONGEST_S)
        # Before it has run at all, it may also be one of those that take no time.
        target = (1 - quantile) * (self._survival(name, elapsed_s) if elapsed_s else 1.0)
        low, high = math.log(max(SHORTEST_S, elapsed_s)), math.log(LONGEST_S)
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            if self._survival(name, math.exp(middle)) > target:
                low = middle
            else:
                high = middle
        return max(0.0, math.exp(high) - elapsed_s)

    def _survival(self, name: str, seconds: float) -> float:
        believed = self._all.survival(seconds, self._prior.survival(seconds))
        sample = self._samples.get(name)
        return believed if sample is None else sample.survival(seconds, believed)

    def check(self) -> None:
        """Raise CacheCorrupt unless the samples are bounded and in order; for tests."""
        if len(self._samples) > MAX_TOOLS:
            raise CacheCorrupt(f"{len(self._samples)} tools are remembered, more than {MAX_TOOLS}")
        for sample in (self._all, *self._samples.values()):
            if len(sample) > MAX_OBSERVATIONS or sorted(sample._recent) != sample._ordered:
                raise CacheCorrupt(f"a sample of {len(sample)} latencies is out of order")
