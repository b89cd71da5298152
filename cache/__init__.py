"""The KV cache's books: which tokens' KV lies in which blocks, and who may use them.

Pure bookkeeping, owned by one thread: no device, no clock. `PrefixCache` is the whole of it.
"""

from collections.abc import Callable, Sequence
from typing import final

from attrs import frozen

from agentrt.cache.blocks import BlockPool
from agentrt.cache.evict import SessionState, TierRates
from agentrt.cache.lease import Copy, Lease
from agentrt.cache.node import Evicted, Match, TokenArray
from agentrt.cache.tree import RadixTree
from agentrt.errors import CacheCorrupt

__all__ = ["CacheStats", "Copy", "Lease", "PrefixCache", "SessionState", "TierRates"]


@frozen(kw_only=True)
class CacheStats:
    """A snapshot of the cache; the token counters run from its creation."""

    num_blocks: int
    free_blocks: int
    leased_blocks: int
    cached_tokens: int
    num_nodes: int
    asked_tokens: int
    hit_tokens: int
    evicted_tokens: int


@final
class PrefixCache:
    """Prefixes in blocks: leases for running requests, a tree for all that can be shared.

    State: the pool, the tree, the set of live leases and the holds. Invariant: a block's references
    are the live leases, holds and nodes that have it, one each; see `check`.
    """

    def __init__(self, num_blocks: int, block_tokens: int, rates: TierRates | None = None) -> None:
        self._pool = BlockPool(num_blocks, block_tokens)
        self._tree = RadixTree(self._pool, rates)
        self._leases: dict[Lease, None] = {}  # in order of their making
        self._held = [0] * num_blocks  # holds on each block
        self.version = 0  # another one whenever what is resident may be
        self._asked_tokens = 0
        self._hit_tokens = 0
        self._evicted_tokens = 0

    def __repr__(self) -> str:
        pool = self._pool
        return (
            f"<PrefixCache {pool.num_free} free, {pool.num_leased} leased of {pool.num_blocks} "
            f"blocks, {self._tree.num_tokens} tokens cached, {len(self._leases)} leases>"
        )

    @property
    def block_tokens(self) -> int:
        """Tokens that a block holds."""
        return self._pool.block_tokens

    def on_evict(self, tell: Callable[[Evicted, float], None]) -> None:
        """Have `tell` called, with the time, for each thing that must make room."""
        self._tree.on_evict = tell

    def peek(self, token_ids: TokenArray, namespace: str = "") -> int:
        """Length in tokens of the longest resident prefix; changes nothing."""
        return self._tree.match(token_ids, namespace).num_tokens

    def find(self, token_ids: TokenArray, namespace: str = "") -> Match:
        """The longest resident prefix, to hand to `acquire` as long as `version` is the same."""
        return self._tree.match(token_ids, namespace)

    def continuation(self, match: Match, namespace: str = "") -> TokenArray:
        """How the tree goes on where a match leaves it: the latest used way, or nothing."""
        return self._tree.continuation(match, namespace)

    def would_evict(self, num_cached: int, num_tokens: int) -> bool:
        """Whether to lease room for `num_tokens`, of which `num_cached` are here, would make
        something go, and can be done."""
        missing = self._num_blocks(num_tokens) - num_cached // self.block_tokens
        return self._pool.num_free < missing <= self._pool.num_blocks - self._pool.num_leased

    def acquire(
        self,
        token_ids: TokenArray,
        *,
        num_tokens: int,
        now: float,
        namespace: str = "",
        max_cached_tokens: int | None = None,
        match: Match | None = None,
    ) -> tuple[Lease, list[Copy]] | None:
        """Lease the longest resident prefix and room for `num_tokens` tokens in all.

        At most `max_cached_tokens` are taken from the tree, and never the last token: computing
        one gives the next one's logits. `match` is what `find` gave for all but that one, at this
        version. Evicts what is worth least; None if the room cannot be had now.
        """
        longest = max(0, len(token_ids) - 1)
        if max_cached_tokens is not None:
            longest = max(0, min(longest, max_cached_tokens))
            match = None
        if match is None:
            match = self._tree.match(token_ids[:longest], namespace)
        taken = self._take(token_ids, match, match.num_tokens, num_tokens, namespace, now)
        num_cached = match.num_tokens
        if taken is None and (inside := num_cached % self._pool.block_tokens):
            # The source of a copy must stay while the copy is made: one block more than the
            # lease will hold. A full pool may have room only if that part is computed again.
            num_cached -= inside
            taken = self._take(token_ids, match, num_cached, num_tokens, namespace, now)
        if taken is None:
            return None
        for node in match.path:
            if node.end <= num_cached:
                node.hit(now)
        self._asked_tokens += len(token_ids)
        self._hit_tokens += num_cached
        return taken

    def extend(self, lease: Lease, num_tokens: int, now: float) -> bool:
        """Make room for `num_tokens` in all; False, and no change, if that cannot be had now."""
        missing = self._num_blocks(num_tokens) - len(lease.block_ids)
        if missing <= 0:
            return True
        assert lease._live, "the lease was released"
        fresh = self._reserve(missing, lease.block_ids[-1] if lease.block_ids else None, now)
        if fresh is None:
            return False
        self._pool.claim(fresh, lease)
        lease.block_ids += fresh
        if lease._leaf is not None:
            lease._leaf.use(now)
        return True

    def commit(self, lease: Lease, token_ids: TokenArray, now: float) -> None:
        """Share the KV of `token_ids`, the whole sequence so far, which is now in the blocks.

        What the tree has already of another lease stays as it is, and so do the lease's blocks.
        """
        assert lease._live, "the lease was released"
        assert lease.num_tokens <= len(token_ids) <= self._capacity_tokens(lease)
        lease._leaf = self._tree.insert(
            token_ids, lease.block_ids, lease._namespace, now, lease._leaf
        )
        lease._token_ids = token_ids.copy()
        lease.num_tokens = len(token_ids)
        self.version += 1

    def fork(self, lease: Lease, num_tokens: int, now: float) -> tuple[Lease, list[Copy]] | None:
        """Open a second lease over the same tokens, with room for `num_tokens` in all.

        Full blocks are shared, a partial last one is copied. None, and no change, if the room
        cannot be had now.
        """
        assert lease._live, "the lease was released"
        num_full, num_inside = divmod(lease.num_tokens, self._pool.block_tokens)
        shared = lease.block_ids[:num_full]
        missing = self._num_blocks(max(num_tokens, lease.num_tokens)) - num_full
        fresh = self._reserve(missing, shared[-1] if shared else None, now)
        if fresh is None:
            return None
        if lease._leaf is not None:
            lease._leaf.use(now)
        child = Lease(lease._token_ids, shared + fresh, lease._namespace)
        self._leases[child] = None
        self._pool.lease(shared)
        self._pool.claim(fresh, child)
        source = lease.block_ids[num_full : num_full + (num_inside > 0)]
        return child, [Copy(block, fresh[0], num_inside) for block in source]

    def release(self, lease: Lease) -> None:
        """Give the lease up; what it committed stays in the tree. Again is fine."""
        if not lease._live:
            return
        lease._live = False
        lease._leaf = None
        del self._leases[lease]
        self._pool.end_lease(lease.block_ids, lease)

    def share(self, lease: Lease) -> Lease:
        """A second lease over what `lease` has committed, to read only; it needs no room.

        A whole path is held, not some blocks of it: what lies above a held block could not go.
        """
        assert lease._live, "the lease was released"
        blocks = lease.block_ids[: self._num_blocks(lease.num_tokens)]
        twin = Lease(lease._token_ids, blocks, lease._namespace, writes=False)
        self._leases[twin] = None
        self._pool.lease(blocks)
        return twin

    def hold(self, block_ids: Sequence[int]) -> None:
        """Keep blocks that a lease writes, also beyond its end: until `unhold`."""
        self._pool.lease(block_ids)
        for block in block_ids:
            self._held[block] += 1

    def unhold(self, block_ids: Sequence[int]) -> None:
        """End a hold."""
        for block in block_ids:
            self._held[block] -= 1
        self._pool.end_lease(block_ids)

    def forget(self, token_ids: TokenArray, *, keep_tokens: int, namespace: str = "") -> int:
        """Drop this path beyond `keep_tokens`, up to what a lease or another path uses.

        Returns the number of tokens dropped.
        """
        self.version += 1
        return self._tree.forget(token_ids, max(0, keep_tokens), namespace)

    def mark(
        self,
        token_ids: TokenArray,
        state: SessionState,
        now: float,
        namespace: str = "",
        expected_s: float | None = None,
    ) -> None:
        """Tell eviction what the session whose log is `token_ids` does.

        `expected_s` is how long its pending tool will take. Call with RUNNING when a turn begins
        and with another state when it ends.
        """
        num_nodes = self._tree.num_nodes
        self._tree.mark(token_ids, state, expected_s, now, namespace)
        self.version += self._tree.num_nodes != num_nodes  # an edge was cut: paths have changed

    def clear(self) -> None:
        """Drop all that no lease uses."""
        self.version += 1
        self._tree.clear()

    def stats(self) -> CacheStats:
        """A snapshot of the counts."""
        return CacheStats(
            num_blocks=self._pool.num_blocks,
            free_blocks=self._pool.num_free,
            leased_blocks=self._pool.num_leased,
            cached_tokens=self._tree.num_tokens,
            num_nodes=self._tree.num_nodes,
            asked_tokens=self._asked_tokens,
            hit_tokens=self._hit_tokens,
            evicted_tokens=self._evicted_tokens,
        )

    def check(self) -> None:
        """Raise CacheCorrupt unless pool, tree and leases agree; for tests, it reads all."""
        self._pool.check()
        self._tree.check()
        leases = list(self._held)
        for lease in self._leases:
            self._check_lease(lease)
            for block in lease.block_ids:
                leases[block] += 1
        references = list(leases)
        for node in self._tree.nodes():
            for block in node.blocks:
                references[block] += 1
        if leases != self._pool.leases or references != self._pool.references:
            raise CacheCorrupt("reference counts differ from what leases and nodes hold")
        for block, writer in enumerate(self._pool.writers):
            if writer is not None and not (
                isinstance(writer, Lease) and writer in self._leases and block in writer.block_ids
            ):
                raise CacheCorrupt(f"the writer of block {block} is no live lease of it")

    def _check_lease(self, lease: Lease) -> None:
        if not lease._live or len(lease._token_ids) != lease.num_tokens:
            raise CacheCorrupt(f"{lease!r} is registered wrongly")
        if lease.num_tokens > self._capacity_tokens(lease):
            raise CacheCorrupt(f"{lease!r} holds more tokens than fit")
        if not lease._writes:
            return
        for block in lease.block_ids[lease.num_tokens // self._pool.block_tokens :]:
            if self._pool.writers[block] is not lease:
                raise CacheCorrupt(f"{lease!r} may not write block {block} behind its tokens")

    def _take(
        self,
        token_ids: TokenArray,
        match: Match,
        num_cached: int,
        num_tokens: int,
        namespace: str,
        now: float,
    ) -> tuple[Lease, list[Copy]] | None:
        """Open a lease over the first `num_cached` tokens of a match, if there is the room."""
        blocks = self._tree.blocks(match.path, num_cached)
        num_inside = num_cached % self._pool.block_tokens
        in_place = bool(num_inside) and self._pool.can_append(blocks[-1], num_inside)
        num_kept = len(blocks) - (num_inside > 0 and not in_place)
        # Held before room is made, so that neither these nor the source of a copy are evicted.
        lease = Lease(token_ids[:num_cached].copy(), blocks, namespace)
        self._leases[lease] = None
        self._pool.lease(blocks)
        if in_place:
            self._pool.claim(blocks[-1:], lease)
        missing = self._num_blocks(max(num_tokens, num_cached)) - num_kept
        fresh = self._reserve(missing, blocks[num_kept - 1] if num_kept else None, now)
        if fresh is None:
            self.release(lease)
            return None
        self._pool.claim(fresh, lease)
        lease.block_ids = blocks[:num_kept] + fresh
        self._pool.end_lease(blocks[num_kept:])
        return lease, [Copy(source, fresh[0], num_inside) for source in blocks[num_kept:]]

    def _reserve(self, num: int, after: int | None, now: float) -> list[int] | None:
        """Allocate `num` blocks, evicting if needed; None if that cannot be."""
        pool = self._pool
        if num > pool.num_blocks - pool.num_leased:
            return None
        if pool.num_free < num:
            self.version += 1
            self._evicted_tokens += self._tree.reclaim(num, now)
        if pool.num_free < num:
            # Rare: the tree holds second copies above the leaves of leases. Without them every
            # block that no lease holds can go, so the first test decides exactly; but for a second
            # copy above the source of a copy, of which the lease in the making is no path.
            for lease in self._leases:
                self._tree.adopt(lease._token_ids, lease.block_ids, lease._namespace)
            self._evicted_tokens += self._tree.reclaim(num, now)
        if pool.num_free < num:
            return None
        return pool.allocate(num, after)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_tokens)

    def _capacity_tokens(self, lease: Lease) -> int:
        return len(lease.block_ids) * self._pool.block_tokens
