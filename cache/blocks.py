"""Ids of the KV blocks: who holds each one, which are free, and which free ones to hand out."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from agentrt.errors import CacheCorrupt

# Below this many entries the heap of extents is never worth compacting.
MIN_HEAP_ENTRIES = 64


class BlockPool:
    """Owner of block ids, their reference counts and the free extents.

    A block counts the references that tree nodes and leases hold on it, and apart from that how
    many of them are leases. It is free when nothing holds it. `committed[b]` is how many leading
    tokens of block b tree nodes cover; `writers[b]` is the one lease that may write behind them.

    Invariant: the extents are the maximal runs of free blocks; each has an entry in the heap,
    which may also hold entries of extents that are gone.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"{num_blocks=} and {block_tokens=} must be at least 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_free = num_blocks
        self.num_leased = 0
        self.references = [0] * num_blocks
        self.leases = [0] * num_blocks
        self.committed = [0] * num_blocks
        self.writers: list[object | None] = [None] * num_blocks
        self._length_at = {0: num_blocks}  # first block of a free extent -> its length
        self._start_before = {num_blocks: 0}  # first block behind a free extent -> its first block
        self._by_length = [(-num_blocks, 0)]  # heap: the largest extent first

    def __repr__(self) -> str:
        return (
            f"<BlockPool {self.num_free} free, {self.num_leased} leased "
            f"of {self.num_blocks} blocks, {len(self._length_at)} extents>"
        )

    def allocate(self, num: int, after: int | None = None) -> list[int]:
        """Take `num` blocks with one reference each; [] if fewer are free.

        The blocks go on behind block `after` as far as those are free. The rest comes from the
        largest extents, since a run of consecutive ids is one strided view for attention.
        """
        if not 0 < num <= self.num_free:
            return []
        blocks: list[int] = []
        if after is not None and (length := self._length_at.get(after + 1)) is not None:
            blocks += self._take(after + 1, after + 1, min(num, length))
        while len(blocks) < num:
            start, length = self._largest_extent()
            wanted = min(num - len(blocks), length)
            blocks += self._take(start, start + self._room(start, length - wanted), wanted)
        for block in blocks:
            self.references[block] = 1
        return blocks

    def retain(self, block: int) -> None:
        """Add a reference to a block that is held already."""
        self.references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; without any left the block is free."""
        self.release_all((block,))

    def retain_all(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block."""
        references = self.references
        for block in blocks:
            references[block] += 1

    def release_all(self, blocks: Iterable[int]) -> None:
        """Drop a reference of each block, and free those that have none left."""
        references = self.references
        unheld = []
        for block in blocks:
            references[block] -= 1
            if not references[block]:
                unheld.append(block)
        if unheld:
            self._free(unheld)

    def claim(self, blocks: Iterable[int], writer: object) -> None:
        """Let the lease `writer` write into these; of a fresh block it gets the one reference."""
        for block in blocks:
            self.writers[block] = writer
            if not self.leases[block]:
                self.leases[block] = 1
                self.num_leased += 1

    def lease(self, blocks: Iterable[int]) -> None:
        """Add a lease's reference to each block; such a block cannot be evicted."""
        references, leases = self.references, self.leases
        for block in blocks:
            references[block] += 1
            leases[block] += 1
            self.num_leased += leases[block] == 1

    def end_lease(self, blocks: Sequence[int], writer: object | None = None) -> None:
        """Drop a lease's references, and its role as the writer where it has that."""
        leases, writers = self.leases, self.writers
        for block in blocks:
            leases[block] -= 1
            self.num_leased -= leases[block] == 0
            if writer is not None and writers[block] is writer:
                writers[block] = None
        self.release_all(blocks)

    def can_append(self, block: int, num_tokens: int) -> bool:
        """Whether a new lease that keeps the first `num_tokens` may write behind them in place."""
        return (
            self.committed[block] == num_tokens
            and self.writers[block] is None
            and not self.leases[block]
        )

    def check(self) -> None:
        """Raise CacheCorrupt unless the extents are exactly the unreferenced blocks, coalesced."""
        free = [False] * self.num_blocks
        heap = set(self._by_length)
        for start, length in self._length_at.items():
            joined = start + length in self._length_at
            if length < 1 or joined or self._start_before.get(start + length) != start:
                raise CacheCorrupt(f"free extent {start}+{length} is malformed")
            if (-length, start) not in heap:
                raise CacheCorrupt(f"free extent {start}+{length} cannot be found by its length")
            free[start : start + length] = [True] * length
        if len(self._start_before) != len(self._length_at) or sum(free) != self.num_free:
            raise CacheCorrupt(f"extents hold {sum(free)} blocks, {self.num_free} are free")
        for block, is_free in enumerate(free):
            self._check_block(block, is_free)
        if sum(count > 0 for count in self.leases) != self.num_leased:
            raise CacheCorrupt(f"the count of leased blocks, {self.num_leased}, is wrong")

    def _check_block(self, block: int, is_free: bool) -> None:
        references, leases = self.references[block], self.leases[block]
        if is_free != (references == 0) or not 0 <= leases <= references:
            raise CacheCorrupt(f"block {block}: {references=} {leases=} {is_free=}")
        writer, committed = self.writers[block], self.committed[block]
        if is_free and (committed or writer is not None):
            raise CacheCorrupt(f"free block {block}: {committed=} {writer=}")

    def _room(self, start: int, spare: int) -> int:
        # The rule is the start of the extent. Only where a live lease ends right before it, and
        # so grows into this extent, half of what is spare stays free in front of the new run.
        # Else two growing leases would cut each other's run at every single block.
        return spare // 2 if start and self.writers[start - 1] is not None else 0

    def _largest_extent(self) -> tuple[int, int]:
        heap = self._by_length
        while True:
            negative_length, start = heap[0]
            if self._length_at.get(start) == -negative_length:
                return start, -negative_length
            heappop(heap)

    def _take(self, start: int, first: int, num: int) -> range:
        """Cut blocks [first, first + num) out of the extent that begins at `start`."""
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        if first > start:
            self._add_extent(start, first - start)
        if first + num < start + length:
            self._add_extent(first + num, start + length - first - num)
        self.num_free -= num
        return range(first, first + num)

    def _free(self, blocks: list[int]) -> None:
        self.num_free += len(blocks)
        blocks.sort()
        start = end = blocks[0]
        for block in blocks:
            self.committed[block] = 0
            self.writers[block] = None
            if block != end:
                self._join_extent(start, end - start)
                start = block
            end = block + 1
        self._join_extent(start, end - start)

    def _join_extent(self, start: int, length: int) -> None:
        behind = self._length_at.pop(start + length, None)
        if behind is not None:
            del self._start_before[start + length + behind]
            length += behind
        before = self._start_before.pop(start, None)
        if before is not None:
            length += self._length_at.pop(before)
            start = before
        self._add_extent(start, length)

    def _add_extent(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        heappush(self._by_length, (-length, start))
        if len(self._by_length) > 2 * len(self._length_at) + MIN_HEAP_ENTRIES:
            self._by_length = [(-length, start) for start, length in self._length_at.items()]
            heapify(self._by_length)
