"""Which grains of a payload file are free, and which run of them to take next."""

from bisect import bisect_left
from collections.abc import Iterable

from agentrt.errors import CacheCorrupt


class ExtentMap:
    """Owner of the free runs among grains [first, limit).

    Invariant: the runs are disjoint, sorted, maximal and within [first, limit).
    """

    def __init__(self, first: int, limit: int, taken: Iterable[tuple[int, int]] = ()) -> None:
        """All is free but `taken`: (start, grains), in order, disjoint and within the limit."""
        self.first = first
        self.limit = limit
        self._lengths: dict[int, int] = {}
        for start, num in [*taken, (limit, 0)]:
            if first < start:
                self._lengths[first] = start - first
            first = start + num
        self._starts = list(self._lengths)

    def __repr__(self) -> str:
        return (
            f"<ExtentMap {self.num_free} free of {self.limit - self.first} grains, "
            f"{len(self._starts)} runs>"
        )

    @property
    def num_free(self) -> int:
        """Free grains, in runs of any length."""
        return sum(self._lengths.values())

    @property
    def end(self) -> int:
        """The first grain behind all that is taken."""
        if self._starts and self._starts[-1] + self._lengths[self._starts[-1]] == self.limit:
            return self._starts[-1]
        return self.limit

    def allocate(self, num: int) -> int | None:
        """Take `num` adjacent grains; None if no run is that long.

        The shortest run that fits is cut at its beginning (the lowest of equals). So long runs
        stay for long records, and the file stays as short as it can.
        """
        best: int | None = None
        for start in self._starts:
            length = self._lengths[start]
            if length >= num and (best is None or length < self._lengths[best]):
                best = start
        if best is not None:
            index, length = bisect_left(self._starts, best), self._lengths.pop(best)
            if length == num:
                del self._starts[index]
            else:
                self._starts[index] = best + num
                self._lengths[best + num] = length - num
        return best

    def free(self, start: int, num: int) -> None:
        """Give grains back; what lies beyond the limit is gone."""
        num = min(num, self.limit - start)
        if num <= 0:
            return
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == start + num:
            num += self._lengths.pop(self._starts.pop(index))
        if index > 0:
            before = self._starts[index - 1]
            if before + self._lengths[before] == start:
                self._lengths[before] += num
                return
        self._starts.insert(index, start)
        self._lengths[start] = num

    def set_limit(self, limit: int) -> None:
        """Move the end. Whoever lowers it frees what is taken beyond it, before or after."""
        old, self.limit = self.limit, limit
        if limit > old:
            self.free(old, limit - old)
        while self._starts and self._starts[-1] + self._lengths[self._starts[-1]] > limit:
            start = self._starts[-1]
            if start >= limit:
                del self._lengths[self._starts.pop()]
            else:
                self._lengths[start] = limit - start

    def check(self, taken: Iterable[tuple[int, int]]) -> None:
        """Raise CacheCorrupt unless `taken` (start, grains) and the free runs tile the range."""
        runs = [(start, self._lengths[start], True) for start in self._starts]
        position, was_free = self.first, False
        for start, num, is_free in sorted(runs + [(*extent, False) for extent in taken]):
            if start != position or num < 1 or (is_free and was_free):
                raise CacheCorrupt(f"grain {start} begins a run, {position} was expected: {self!r}")
            position, was_free = start + num, is_free
        if position != max(self.limit, self.first):
            raise CacheCorrupt(f"grains end at {position}: {self!r}")
