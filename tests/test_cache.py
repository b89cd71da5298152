import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from agentrt.cache import Copy, PrefixCache, SessionState
from agentrt.errors import CacheCorrupt

JUNK = -1


def ids(*parts):
    """Token ids: a range for each (first, last) pair, single ids as they are."""
    tokens = []
    for part in parts:
        tokens += range(*part) if isinstance(part, tuple) else [part]
    return np.array(tokens, np.int32)


def kv_of(namespace, token_ids):
    """What the KV of each token must read as: like the real one it depends on all before it."""
    state, kv = hash(namespace), []
    for token in token_ids:
        state = hash((state, int(token)))
        kv.append(state)
    return kv


class FakeDevice:
    """Device memory: one number per token slot, written as a runner would."""

    def __init__(self, num_blocks, block_tokens):
        self.block_tokens = block_tokens
        self.slots = np.full((num_blocks, block_tokens), JUNK, dtype=object)
        self.copies = []

    def flush(self):
        """Make the copies that are due, in order; a forward begins with that."""
        for copy in self.copies:
            self.slots[copy.target, : copy.num_tokens] = self.slots[copy.source, : copy.num_tokens]
        self.copies = []

    def write(self, lease, kv):
        """Write from the lease's tokens on: known KV, then junk as far as the lease may write."""
        self.flush()
        for position in range(lease.num_tokens, len(lease.block_ids) * self.block_tokens):
            index, offset = divmod(position, self.block_tokens)
            value = kv[position] if position < len(kv) else JUNK
            self.slots[lease.block_ids[index], offset] = value

    def read(self, blocks, num_tokens):
        return list(self.slots[blocks].reshape(-1)[:num_tokens]) if num_tokens else []


class Bench:
    """A cache with its fake device, which runs each request as far as it is told."""

    def __init__(self, num_blocks=16, block_tokens=4):
        self.cache = PrefixCache(num_blocks, block_tokens)
        self.device = FakeDevice(num_blocks, block_tokens)

    def acquire(self, tokens, num_tokens=None, now=0.0, namespace="", **options):
        taken = self.cache.acquire(
            tokens, num_tokens=num_tokens or len(tokens), now=now, namespace=namespace, **options
        )
        self.cache.check()
        if taken is None:
            return None
        self.device.copies += taken[1]
        return taken[0]

    def commit(self, lease, tokens, now=0.0):
        self.device.write(lease, kv_of(lease._namespace, tokens))
        self.cache.commit(lease, tokens, now)
        self.check_reads(lease, tokens)

    def check_reads(self, lease, tokens):
        self.cache.check()
        read = self.device.read(lease.block_ids, lease.num_tokens)
        assert read == kv_of(lease._namespace, tokens[: lease.num_tokens])

    def serve(self, tokens, now=0.0, namespace=""):
        """Run a whole request and leave its tokens in the tree; return the tokens it hit."""
        lease = self.acquire(tokens, now=now, namespace=namespace)
        self.commit(lease, tokens, now)
        self.cache.release(lease)
        self.cache.check()
        return lease.num_cached_tokens


@pytest.fixture
def bench():
    return Bench()


def test_a_second_request_hits_all_but_the_last_token(bench):
    assert bench.serve(ids((0, 10))) == 0
    assert bench.cache.peek(ids((0, 10))) == 10
    assert bench.serve(ids((0, 10))) == 9
    assert bench.serve(ids((0, 10), (50, 60))) == 10
    assert bench.cache.peek(ids((0, 10)), "other") == 0
    stats = bench.cache.stats()
    assert (stats.asked_tokens, stats.hit_tokens, stats.cached_tokens) == (40, 19, 20)


def test_a_second_copy_above_the_source_of_a_copy_gives_way():
    """The source must stay while it is copied, and so must what lies above it in the tree: then
    there is room only for a lease that computes that part itself."""
    bench = Bench(num_blocks=4)
    first, second = bench.acquire(ids((0, 8))), bench.acquire(ids((0, 6)), num_tokens=8)
    bench.commit(first, ids((0, 5)))
    bench.commit(second, ids((0, 6)))  # the sixth token lies in a block of the second lease
    bench.commit(first, ids((0, 8)))  # and what comes behind it in one of the first
    bench.cache.release(first)
    bench.cache.release(second)
    lease = bench.acquire(ids((0, 5), 90), num_tokens=12)
    assert lease.num_cached_tokens == 4
    bench.commit(lease, ids((0, 5), 90))


def test_the_end_of_a_block_is_appended_to_in_place(bench):
    bench.serve(ids((0, 6)))
    lease, copies = bench.cache.acquire(ids((0, 6), 50), num_tokens=12, now=0.0)
    assert copies == []
    assert lease.block_ids == [0, 1, 2]
    other, copies = bench.cache.acquire(ids((0, 6), 60), num_tokens=8, now=0.0)
    assert copies == [Copy(1, other.block_ids[1], 2)]
    bench.device.copies += copies
    bench.commit(lease, ids((0, 6), 50))
    bench.commit(other, ids((0, 6), 60))
    bench.check_reads(lease, ids((0, 6), 50))
    assert bench.cache.peek(ids((0, 6), 50)) == bench.cache.peek(ids((0, 6), 60)) == 7


def test_a_hit_inside_a_filled_block_is_copied(bench):
    bench.serve(ids((0, 8)))
    lease, copies = bench.cache.acquire(ids((0, 6), 90), num_tokens=7, now=0.0)
    assert copies == [Copy(1, lease.block_ids[1], 2)]
    assert lease.num_cached_tokens == 6
    assert repr(lease) == "<Lease live, 6 tokens in 2 blocks>"


def test_max_cached_tokens_bounds_the_hit(bench):
    bench.serve(ids((0, 8)))
    assert bench.acquire(ids((0, 8)), max_cached_tokens=4).num_cached_tokens == 4
    assert bench.acquire(ids((0, 8)), max_cached_tokens=0).num_cached_tokens == 0


def test_acquire_says_none_and_changes_nothing_when_it_cannot_fit(bench):
    bench.serve(ids((0, 8)))
    held = bench.acquire(ids((100, 140)))
    before = bench.cache.stats()
    assert bench.acquire(ids((0, 8)), num_tokens=28) is None
    assert bench.cache.stats() == before
    assert not bench.cache.extend(held, 65, 0.0)
    assert bench.cache.fork(held, 80, 0.0) is None
    assert bench.cache.stats() == before
    assert bench.acquire(ids((0, 8)), num_tokens=24) is not None


def test_a_request_fits_in_a_pool_that_its_own_prefix_fills():
    bench = Bench(num_blocks=4)
    bench.serve(ids((0, 16)))
    lease = bench.acquire(ids((0, 14), 70, 71))
    assert lease.num_cached_tokens == 12  # a copy would need a fifth block
    bench.commit(lease, ids((0, 14), 70, 71))


def test_extend_goes_on_behind_the_last_block(bench):
    lease = bench.acquire(ids((0, 6)))
    bench.commit(lease, ids((0, 6)))
    assert bench.cache.extend(lease, 8, 1.0)
    assert len(lease.block_ids) == 2
    assert bench.cache.extend(lease, 20, 1.0)
    assert lease.block_ids == [0, 1, 2, 3, 4]
    bench.commit(lease, ids((0, 20)))


def test_extend_evicts_second_copies_above_its_own_leaf():
    bench = Bench(num_blocks=8)
    first, second = bench.acquire(ids((0, 6))), bench.acquire(ids((0, 6)))
    bench.commit(first, ids((0, 6)))
    bench.cache.extend(second, 12, 0.0)
    bench.commit(second, ids((0, 12)))
    bench.cache.release(first)
    assert bench.cache.extend(second, 32, 0.0)
    bench.commit(second, ids((0, 32)))
    assert bench.cache.stats().free_blocks == 0


def test_fork_shares_full_blocks_and_copies_the_last(bench):
    lease = bench.acquire(ids((0, 6)), num_tokens=8)
    bench.commit(lease, ids((0, 6)))
    child, copies = bench.cache.fork(lease, 8, 1.0)
    assert copies == [Copy(lease.block_ids[1], child.block_ids[1], 2)]
    assert child.block_ids[0] == lease.block_ids[0]
    bench.device.copies += copies
    bench.commit(lease, ids((0, 6), 70))
    bench.commit(child, ids((0, 6), 80))
    bench.check_reads(lease, ids((0, 6), 70))
    bench.cache.release(lease)
    even, copies = bench.cache.fork(child, 12, 1.0)
    assert len(copies) == 1
    assert even.num_cached_tokens == 7


def test_fork_of_a_request_whose_copy_is_still_due(bench):
    bench.serve(ids((0, 8)))
    lease = bench.acquire(ids((0, 6), 90))
    child, copies = bench.cache.fork(lease, 8, 0.0)
    bench.device.copies += copies
    bench.commit(child, ids((0, 6), 91))
    bench.commit(lease, ids((0, 6), 90))


def test_release_is_idempotent_and_keeps_what_was_committed(bench):
    lease = bench.acquire(ids((0, 6)), num_tokens=40)
    bench.commit(lease, ids((0, 6)))
    assert bench.cache.stats().leased_blocks == 10
    bench.cache.release(lease)
    bench.cache.release(lease)
    stats = bench.cache.stats()
    assert (stats.leased_blocks, stats.free_blocks, stats.cached_tokens) == (0, 14, 6)
    assert "released" in repr(lease)


def test_two_requests_that_compute_the_same_keep_their_own_blocks(bench):
    first, second = bench.acquire(ids((0, 10))), bench.acquire(ids((0, 10)))
    bench.commit(first, ids((0, 10)))
    blocks = list(second.block_ids)
    bench.commit(second, ids((0, 10)))
    assert second.block_ids == blocks
    assert bench.cache.stats().cached_tokens == 10
    bench.cache.release(first)
    bench.cache.release(second)
    assert bench.cache.stats().free_blocks == 13


def test_forget_spares_what_a_lease_uses(bench):
    bench.serve(ids((0, 20)))
    lease = bench.acquire(ids((0, 8), 90))
    assert bench.cache.forget(ids((0, 20)), keep_tokens=2) == 12
    bench.cache.release(lease)
    assert bench.cache.forget(ids((0, 8)), keep_tokens=2) == 6
    assert bench.serve(ids((0, 2), 40)) == 2
    bench.cache.clear()
    assert bench.cache.stats().free_blocks == 16


def test_pressure_takes_the_closed_session_first():
    bench = Bench(num_blocks=8)
    bench.serve(ids((0, 16)), now=5.0)
    bench.serve(ids((100, 116)), now=1.0)
    bench.cache.mark(ids((0, 16)), SessionState.CLOSED, 5.0)
    bench.cache.mark(ids((100, 116)), SessionState.TOOL_PENDING, 5.0, expected_s=2.0)
    bench.serve(ids((200, 206)), now=6.0)
    assert bench.cache.peek(ids((0, 16))) == 8
    assert bench.cache.peek(ids((100, 116))) == 16
    assert bench.cache.stats().evicted_tokens == 8


def test_repr_shows_live_counts(bench):
    bench.serve(ids((0, 6)))
    bench.acquire(ids(9))
    assert repr(bench.cache) == (
        "<PrefixCache 13 free, 1 leased of 16 blocks, 6 tokens cached, 1 leases>"
    )


def _forget_a_lease(cache, lease):
    cache._leases.clear()


def _lose_a_block(cache, lease):
    lease.block_ids.pop()


def _miscount(cache, lease):
    lease.num_tokens += 1


def _lose_the_writer(cache, lease):
    cache._pool.writers[lease.block_ids[-1]] = None


def _write_for_another(cache, lease):
    cache._pool.writers[lease.block_ids[0]] = "nobody"


@pytest.mark.parametrize(
    "corrupt",
    [_forget_a_lease, _lose_a_block, _miscount, _lose_the_writer, _write_for_another],
)
def test_check_notices(bench, corrupt):
    lease = bench.acquire(ids((0, 10)))
    bench.commit(lease, ids((0, 10)))
    corrupt(bench.cache, lease)
    with pytest.raises(CacheCorrupt):
        bench.cache.check()


def num_common(left, right):
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))


# Few distinct runs, of up to a few blocks: sequences meet, and part inside blocks.
namespaces = st.sampled_from(["", "", "", "tenant"])
runs = st.builds(
    lambda first, length: (first,) * min(length, 2) + (7,) * (length - 2),
    st.integers(0, 2),
    st.integers(1, 20),
)


class CacheMachine(RuleBasedStateMachine):
    """Requests in any order against a set of all that was ever committed."""

    def __init__(self):
        super().__init__()
        self.leases = []  # (lease, the tokens of its request so far)
        self.committed = {"": [], "tenant": []}
        self.lossy = False  # something left the tree, so a hit may fall short of the model
        self.now = 0.0
        self.version = -1
        self.found = []  # (tokens, namespace, match, the ends of its nodes), of this version

    @initialize(block_tokens=st.sampled_from([1, 4, 16]), num_blocks=st.integers(6, 24))
    def open(self, block_tokens, num_blocks):
        self.bench = Bench(num_blocks, block_tokens)
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks

    def longest(self, tokens, namespace):
        known = self.committed[namespace]
        return max((num_common(tokens, other) for other in known), default=0)

    def sequence(self, data, namespace):
        """A prefix of something known, or nothing, and then a run of new tokens."""
        known = self.committed[namespace][-8:]
        prefix = data.draw(st.sampled_from(known)) if known else ()
        if data.draw(st.booleans()):
            prefix = prefix[: data.draw(st.integers(0, len(prefix)))]
        return (*prefix[: self.num_blocks * self.block_tokens // 2], *data.draw(runs))

    def note_losses(self):
        self.lossy |= self.bench.cache.stats().evicted_tokens > 0

    def can_fit(self, num_tokens, shared):
        leased = {block for lease, _ in self.leases for block in lease.block_ids} | set(shared)
        return -(-num_tokens // self.block_tokens) - len(shared) <= self.num_blocks - len(leased)

    def pick(self, data):
        return data.draw(st.integers(0, len(self.leases) - 1))

    @rule(
        data=st.data(),
        namespace=namespaces,
        spare=st.integers(0, 9),
        cap=st.none() | st.integers(0, 60),
    )
    def acquire(self, data, namespace, spare, cap):
        tokens = self.sequence(data, namespace)
        self.now += 1
        found = self.bench.cache.peek(np.array(tokens, np.int32), namespace)
        expected = min(found, len(tokens) - 1, 1000 if cap is None else cap)
        before = self.bench.cache.stats()
        lease = self.bench.acquire(
            np.array(tokens, np.int32), len(tokens) + spare, self.now, namespace,
            max_cached_tokens=cap,
        )  # fmt: skip
        if lease is None:
            assert self.bench.cache.stats() == before
            tree = self.bench.cache._tree
            match = tree.match(np.array(tokens[:expected], np.int32), namespace)
            full = tree.blocks(match.path, expected)[: expected // self.block_tokens]
            assert not self.can_fit(len(tokens) + spare, full)
            return
        hits = {expected, expected - expected % self.block_tokens}
        assert lease.num_cached_tokens in hits
        assert len(lease.block_ids) == -(-(len(tokens) + spare) // self.block_tokens)
        self.leases.append((lease, tokens))
        self.note_losses()

    @rule()
    @precondition(lambda self: self.leases)
    def forward(self):
        """Steps that were not committed yet write, too."""
        for lease, _ in self.leases:
            self.bench.device.write(lease, [])

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def commit(self, data):
        place = self.pick(data)
        lease, tokens = self.leases[place]
        capacity = len(lease.block_ids) * self.block_tokens
        tokens = (tokens + data.draw(runs))[: max(capacity, len(tokens))]
        count = min(capacity, len(tokens))
        if data.draw(st.booleans()):
            count = data.draw(st.integers(lease.num_tokens, count))
        self.leases[place] = (lease, tokens)
        self.commit_tokens(lease, tokens[:count])

    @rule(data=st.data(), namespace=namespaces, goes=st.booleans())
    def serve(self, data, namespace, goes):
        """A whole request at once: what most tests of sharing begin with."""
        tokens = self.sequence(data, namespace)
        lease = self.bench.acquire(
            np.array(tokens, np.int32), len(tokens), self.now, namespace=namespace
        )
        if lease is None:
            return
        self.note_losses()
        self.commit_tokens(lease, tokens)
        if goes:
            self.bench.cache.release(lease)
        else:
            self.leases.append((lease, tokens))

    def commit_tokens(self, lease, tokens):
        self.now += 1
        self.bench.commit(lease, np.array(tokens, np.int32), self.now)
        self.committed[lease._namespace].append(tokens)

    @rule(data=st.data(), more=st.integers(0, 9))
    @precondition(lambda self: self.leases)
    def extend(self, data, more):
        lease, _ = self.leases[self.pick(data)]
        num_tokens = len(lease.block_ids) * self.block_tokens + more
        fits = self.can_fit(num_tokens, lease.block_ids)
        before = self.bench.cache.stats(), list(lease.block_ids)
        self.now += 1
        assert self.bench.cache.extend(lease, num_tokens, self.now) == fits
        if not fits:
            assert before == (self.bench.cache.stats(), lease.block_ids)
        assert not fits or len(lease.block_ids) * self.block_tokens >= num_tokens
        self.note_losses()

    @rule(data=st.data(), more=st.integers(0, 10))
    @precondition(lambda self: self.leases)
    def fork(self, data, more):
        lease, tokens = self.leases[self.pick(data)]
        num_tokens = lease.num_tokens + more
        shared = lease.block_ids[: lease.num_tokens // self.block_tokens]
        fits = self.can_fit(num_tokens, shared)
        forked = self.bench.cache.fork(lease, num_tokens, self.now)
        assert (forked is not None) == fits
        if forked is not None:
            self.bench.device.copies += forked[1]
            self.leases.append((forked[0], tokens[: lease.num_tokens]))
        self.note_losses()

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def release(self, data):
        lease, _ = self.leases.pop(self.pick(data))
        self.bench.cache.release(lease)
        self.bench.cache.release(lease)

    @rule(data=st.data(), namespace=namespaces)
    def forget(self, data, namespace):
        tokens = self.sequence(data, namespace)
        keep = data.draw(st.integers(0, len(tokens)))
        array = np.array(tokens, np.int32)
        found = self.bench.cache.peek(array, namespace)
        dropped = self.bench.cache.forget(array, keep_tokens=keep, namespace=namespace)
        assert self.bench.cache.peek(array, namespace) == found - dropped
        assert dropped <= max(0, found - keep)
        self.lossy |= dropped > 0

    @rule(
        data=st.data(),
        namespace=namespaces,
        state=st.sampled_from(SessionState),
        expected_s=st.none() | st.floats(0, 100),
    )
    def mark(self, data, namespace, state, expected_s):
        array = np.array(self.sequence(data, namespace), np.int32)
        found = self.bench.cache.peek(array, namespace)
        self.bench.cache.mark(array[:found], state, self.now, namespace, expected_s)
        assert self.bench.cache.peek(array, namespace) == found

    @rule(seldom=st.integers(0, 9))
    def clear(self, seldom):
        if seldom < 9:
            return
        self.bench.cache.clear()
        self.lossy = True
        if not self.leases:
            assert self.bench.cache.stats().free_blocks == self.num_blocks

    @rule(data=st.data(), namespace=namespaces)
    def peek(self, data, namespace):
        tokens = self.sequence(data, namespace)
        found = self.bench.cache.peek(np.array(tokens, np.int32), namespace)
        longest = self.longest(tokens, namespace)
        assert found <= longest if self.lossy else found == longest

    @invariant()
    def all_agree(self):
        if not hasattr(self, "bench"):
            return
        self.bench.cache.check()
        if not self.bench.device.copies:  # else the next forward makes them first
            for lease, tokens in self.leases:
                self.bench.check_reads(lease, tokens)

    @invariant()
    def what_was_found_holds_as_long_as_the_version(self):
        if not hasattr(self, "bench"):
            return
        cache = self.bench.cache
        for tokens, namespace, match, ends in self.found if cache.version == self.version else ():
            again = cache.find(tokens, namespace)
            assert again.num_tokens == match.num_tokens
            assert [id(node) for node in again.path] == [id(node) for node in match.path]
            assert [node.end for node in match.path] == ends
        self.version, self.found = cache.version, []
        for namespace, logs in self.committed.items():
            for tokens in logs[-6:]:
                array = np.array((*tokens, 5), np.int32)
                match = cache.find(array, namespace)
                self.found.append((array, namespace, match, [node.end for node in match.path]))

    @invariant()
    def every_cached_path_reads_back(self):
        if not hasattr(self, "bench") or self.bench.device.copies:
            return
        tree = self.bench.cache._tree
        for node in tree.nodes():
            path = [node]
            while path[0].parent.attached:
                path.insert(0, path[0].parent)
            tokens = np.concatenate([part.tokens for part in path])
            blocks = tree.blocks(path, node.end)
            assert self.bench.device.read(blocks, node.end) == kv_of(node.namespace, tokens)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
