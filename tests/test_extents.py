import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt.cache.extents import ExtentMap
from agentrt.errors import CacheCorrupt


def test_the_shortest_run_that_fits_is_cut_at_its_beginning():
    extents = ExtentMap(1, 100, [(1, 4), (10, 10), (23, 7)])  # free: 5-9, 20-22, 30-99
    assert extents.allocate(2) == 20
    assert extents.allocate(2) == 5
    assert extents.allocate(4) == 30
    assert extents.allocate(80) is None
    assert extents.end == 34


def test_a_lower_limit_takes_the_room_behind_it():
    extents = ExtentMap(0, 10)
    assert extents.allocate(6) == 0
    extents.set_limit(4)
    extents.free(0, 6)
    assert (extents.num_free, extents.end) == (4, 0)
    extents.set_limit(8)
    assert extents.allocate(8) == 0
    extents.check([(0, 8)])


def test_overlaps_and_leaks_are_found():
    extents = ExtentMap(0, 10)
    extents.allocate(3)
    extents.check([(0, 3)])
    with pytest.raises(CacheCorrupt):
        extents.check([])
    with pytest.raises(CacheCorrupt):
        extents.check([(0, 4)])


@given(st.data())
def test_free_and_taken_always_tile_the_range(data):
    extents, taken = ExtentMap(1, 40), []
    for _ in range(data.draw(st.integers(0, 60))):
        action = data.draw(st.sampled_from(["allocate", "free", "limit"]))
        if action == "allocate":
            num = data.draw(st.integers(1, 9))
            longest = max((n for n in range(1, 60) if _fits(extents, taken, n)), default=0)
            start = extents.allocate(num)
            assert (start is None) == (num > longest)
            if start is not None:
                taken.append((start, num))
        elif action == "free" and taken:
            extents.free(*taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        elif action == "limit":
            limit = data.draw(st.integers(1, 60))
            for extent in [extent for extent in taken if sum(extent) > limit]:
                taken.remove(extent)
                extents.free(*extent)
            extents.set_limit(limit)
        extents.check(taken)
        assert extents.num_free == extents.limit - 1 - sum(num for _, num in taken)
        assert extents.end == max((sum(extent) for extent in taken), default=1)


def _fits(extents, taken, num):
    used = {grain for start, length in taken for grain in range(start, start + length)}
    return any(
        used.isdisjoint(range(start, start + num)) for start in range(1, extents.limit - num + 1)
    )
