import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.cache.blocks import BlockPool
from agentrt.errors import CacheCorrupt


def test_allocate_continues_behind_a_block():
    pool = BlockPool(16, 4)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    assert pool.allocate(2, after=2) == [3, 4]
    pool.check()


def test_allocate_returns_nothing_when_short():
    pool = BlockPool(4, 4)
    assert pool.allocate(5) == []
    assert pool.allocate(0) == []
    assert pool.num_free == 4
    pool.check()


def test_allocate_starts_at_the_start_of_the_largest_extent():
    pool = BlockPool(20, 4)
    pool.allocate(20)
    pool.release_all([2, 3, 8, 9, 10, 11, 15])
    assert pool.allocate(2) == [8, 9]
    assert pool.allocate(1, after=14) == [15]
    pool.check()


def test_allocate_uses_few_extents_when_one_is_too_small():
    pool = BlockPool(12, 4)
    pool.allocate(12)
    pool.release_all([0, 2, 3, 5, 6, 7, 9])
    assert pool.allocate(5) == [5, 6, 7, 2, 3]
    pool.check()


def test_allocate_goes_on_elsewhere_when_the_run_ends():
    pool = BlockPool(12, 4)
    pool.allocate(12)
    pool.release_all([3, 4, 7, 8, 9])
    assert pool.allocate(4, after=2) == [3, 4, 7, 8]
    pool.check()


def test_growing_leases_keep_room_behind_their_runs():
    pool = BlockPool(1000, 4)
    runs = {name: pool.allocate(4) for name in "a"}
    pool.claim(runs["a"], "a")
    for name in "bcd":
        runs[name] = pool.allocate(4)
        pool.claim(runs[name], name)
    for _ in range(50):
        for name, run in runs.items():
            fresh = pool.allocate(1, after=run[-1])
            pool.claim(fresh, name)
            run += fresh
    for run in runs.values():
        assert run == list(range(run[0], run[0] + len(run)))
    pool.check()


def test_a_block_is_free_when_nothing_holds_it():
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool.claim([block], "writer")
    pool.retain(block)
    assert pool.num_leased == 1
    pool.end_lease([block], "writer")
    assert (pool.num_leased, pool.num_free, pool.writers[block]) == (0, 3, None)
    pool.release(block)
    assert pool.num_free == 4
    pool.check()


def test_only_the_end_of_a_block_that_nobody_uses_can_be_appended_to():
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool.committed[block] = 2
    assert pool.can_append(block, 2)
    assert not pool.can_append(block, 1)
    pool.lease([block])
    assert not pool.can_append(block, 2)
    pool.claim([block], "writer")
    assert pool.num_leased == 1
    pool.end_lease([block], "writer")
    assert pool.can_append(block, 2)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(*arguments)


def _double_count(pool):
    pool.references[3] = 1


def _lose_a_lease(pool):
    pool.num_leased = 1


def _lose_an_extent(pool):
    pool._start_before.clear()


def _lose_the_heap(pool):
    pool._by_length.clear()


def _miscount(pool):
    pool.num_free -= 1


def _write_a_free_block(pool):
    pool.writers[0] = "nobody"


@pytest.mark.parametrize(
    "corrupt",
    [
        _double_count,
        _lose_a_lease,
        _lose_an_extent,
        _lose_the_heap,
        _miscount,
        _write_a_free_block,
    ],
)
def test_check_notices(corrupt):
    pool = BlockPool(8, 4)
    corrupt(pool)
    with pytest.raises(CacheCorrupt):
        pool.check()


def test_the_heap_of_extents_stays_small():
    pool = BlockPool(1000, 4)
    run = pool.allocate(1)
    for _ in range(999):
        run += pool.allocate(1, after=run[-1])
    assert run == list(range(1000))
    for block in run:
        pool.release(block)
    assert len(pool._by_length) <= 70
    pool.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 23)), max_size=40))
def test_pool_agrees_with_a_set_of_free_ids(steps):
    pool, held = BlockPool(24, 4), []
    for takes, num, place in steps:
        if takes:
            free = set(range(24)) - set(held)
            after = place if place in held else None
            blocks = pool.allocate(num, after=after)
            assert len(blocks) == (num if num <= len(free) else 0)
            assert set(blocks) <= free
            assert len(set(blocks)) == len(blocks)
            if blocks and after is not None and after + 1 in free:
                assert blocks[0] == after + 1
            held += blocks
        else:
            pool.release_all(held[place : place + num])
            del held[place : place + num]
        pool.check()
        assert pool.num_free == 24 - len(held)
    assert repr(pool).startswith("<BlockPool")
