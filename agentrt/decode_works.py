"""Decode rows in the order in which they are computed, and what they have in common: blocks that
their contexts begin with, found by their ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from triton import next_power_of_2

from agentrt.kernels.attention_decode import members, tile_tokens
from agentrt.scheduler import Work

# Tiles are read for several rows at once if that leaves out 1 in so many of all.
LEAST_SAVED_SHARE = 8

Array = NDArray[np.int32]


@frozen(eq=False)
class DecodeWorks:
    """Works of one token each in the order in which they are to be computed, and how many tiles of
    context each has: the first `num_common` have their first `common_tiles` in common (see
    `kernels.attention_common`)."""

    works: tuple[Work, ...]
    tiles: Array
    num_common: int = 0
    common_tiles: int = 0

    @classmethod
    def of(cls, works: Sequence[Work], dim: int) -> DecodeWorks:
        """With nothing in common, for heads of `dim` numbers. As `attention_decode.num_tiles`."""
        starts = np.array([work.start for work in works], dtype=np.int32)
        return cls(tuple(works), np.maximum(1, -(-starts // tile_tokens(dim))))

    @property
    def starts(self) -> Array:
        """[works + 1]: where the tiles of each begin that are its own, of which it has one at
        least, its last."""
        own = self.tiles.copy()
        own[: self.num_common] -= self.common_tiles
        ends = np.zeros(len(own) + 1, dtype=np.int32)
        np.cumsum(np.maximum(1, own), out=ends[1:])
        return ends


def find_common(decode: DecodeWorks, block_tokens: int, dim: int, group_heads: int) -> DecodeWorks:
    """By heads of `dim` numbers, `group_heads` of them a kv head: the largest group of works with
    the same first block, and what all of it has in common, where that pays."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, work in enumerate(decode.works):
        groups[_blocks(work)[0]].append(index)
    group = max(groups.values(), key=len)
    works = [decode.works[index] for index in group]
    # The least and the greatest list: what they have in common, all between them have.
    first, last = min(map(_blocks, works)), max(map(_blocks, works))
    least = min(work.start for work in works) // block_tokens  # a row's last block is its own
    num_blocks = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    tiles = min(num_blocks, least) * block_tokens // tile_tokens(dim)
    reads = -(-len(group) // members(next_power_of_2(group_heads)))
    if (len(group) - reads) * tiles * LEAST_SAVED_SHARE < int(decode.tiles.sum()):
        return decode
    order = [*group, *sorted(set(range(len(decode.works))) - set(group))]
    ordered = tuple(decode.works[index] for index in order)
    return DecodeWorks(ordered, decode.tiles[order], len(group), tiles)


def _blocks(work: Work) -> list[int]:
    lease = work.request.lease
    assert lease is not None, "a request that is computed has a lease"
    return lease.block_ids
