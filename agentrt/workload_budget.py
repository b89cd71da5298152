"""How large a KV cache a workload wants: from what was asked for again, and what came between."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from attrs import define, field, frozen

CHUNK_TOKENS = 16  # a block of the device


@define
class Accesses:
    """What a replay asked the cache for, in order: keys of a prompt's chunks. A key stands for all
    tokens up to its chunk's end, as in the cache itself."""

    keys: list[int] = field(factory=list)

    def note(self, token_ids: Sequence[int]) -> None:
        """A prompt was asked for."""
        self.keys += chunk_keys(token_ids)


def chunk_keys(token_ids: Sequence[int]) -> Iterator[int]:
    key = 0
    for end in range(CHUNK_TOKENS, len(token_ids) + 1, CHUNK_TOKENS):
        key = hash((key, tuple(token_ids[end - CHUNK_TOKENS : end])))
        yield key


def reuse_distances(keys: Iterable[Hashable]) -> list[int]:
    """For each key that came before: how many different ones came since, itself included. A cache
    of so many, that drops the least recently used, still has it (Mattson's stack distance)."""
    order = list(keys)
    marks = [0] * (len(order) + 1)  # a Fenwick tree: 1 where a key stands last

    def add(position: int, change: int) -> None:
        position += 1
        while position < len(marks):
            marks[position] += change
            position += position & -position

    def before(position: int) -> int:
        total = 0
        while position:
            total += marks[position]
            position -= position & -position
        return total

    last: dict[Hashable, int] = {}
    distances: list[int] = []
    for now, key in enumerate(order):
        if key in last:
            distances.append(len(last) - before(last[key]))
            add(last[key], -1)
        add(now, 1)
        last[key] = now
    return distances


@frozen(kw_only=True)
class Budget:
    """A cache of `num_bytes` serves this share of the tokens that an endless one would."""

    share: float
    num_bytes: int


def budgets(keys: Sequence[Hashable], kv_token_bytes: int, shares: Sequence[float]) -> list[Budget]:
    """The smallest caches for those shares; none where nothing was asked for twice."""
    distances = sorted(reuse_distances(keys))
    if not distances:
        return []
    chunk_bytes = CHUNK_TOKENS * kv_token_bytes
    return [
        Budget(
            share=share,
            num_bytes=chunk_bytes * distances[min(len(distances) - 1, int(share * len(distances)))],
        )
        for share in shares
    ]
