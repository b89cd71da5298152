"""What decode rows have in common: blocks that their contexts begin with, found by their ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from attrs import frozen
from triton import next_power_of_2

from agentrt.kernels.attention_decode import members, num_tiles, tile_tokens
from agentrt.scheduler import Work

# Tiles are read for several rows at once if that leaves out 1 in so many of all.
LEAST_SAVED_SHARE = 8


@frozen
class Common:
    """Decode rows in the order in which they are to be computed: the first `num_rows` have their
    first `num_tiles` tiles in common (see `kernels.attention_common`)."""

    works: tuple[Work, ...]
    num_rows: int = 0
    num_tiles: int = 0

    def own_tiles(self, tiles: Sequence[int]) -> list[int]:
        """Of each row: its `tiles` without those in common, and one at least: its last."""
        ahead = [self.num_tiles if row < self.num_rows else 0 for row in range(len(tiles))]
        return [max(1, all_ - common) for all_, common in zip(tiles, ahead, strict=True)]


def find_common(works: Sequence[Work], block_tokens: int, dim: int, group_heads: int) -> Common:
    """Of decode works, by heads of `dim` numbers, `group_heads` of them a kv head: the largest
    group with the same first block, and what all of it has in common, where that pays."""
    groups: dict[int, list[Work]] = defaultdict(list)
    for work in works:
        groups[_blocks(work)[0]].append(work)
    group = max(groups.values(), key=len)
    # The least and the greatest list: what they have in common, all between them have.
    first, last = min(map(_blocks, group)), max(map(_blocks, group))
    least = min(work.start for work in group) // block_tokens  # a row's last block is its own
    num_blocks = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    tiles = min(num_blocks, least) * block_tokens // tile_tokens(dim)
    reads = -(-len(group) // members(next_power_of_2(group_heads)))
    num_saved, num_all = (len(group) - reads) * tiles, sum(num_tiles(w.start, dim) for w in works)
    if num_saved * LEAST_SAVED_SHARE < num_all:
        return Common(tuple(works))
    in_group = set(map(id, group))
    others = [work for work in works if id(work) not in in_group]
    return Common((*group, *others), len(group), tiles)


def _blocks(work: Work) -> list[int]:
    lease = work.request.lease
    assert lease is not None, "a request that is computed has a lease"
    return lease.block_ids
