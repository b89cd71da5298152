import math

import pytest
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.cache.evict import (
    DEAD_STATES,
    NEAREST_S,
    STALE_S,
    EvictionQueue,
    SessionState,
    TierRates,
    compute_s,
    inherit,
    next_use_s,
    saving_s,
    use_chance,
    worth,
)
from agentrt.errors import CacheCorrupt

RATES = TierRates()
TOOL = SessionState.TOOL_PENDING


@define(eq=False)
class Facts:
    start: int = 0
    num_tokens: int = 64
    num_children: int = 0
    last_used_s: float = 1000.0
    num_hits: int = 0
    is_below: bool = False
    state: SessionState | None = None
    marked_s: float = 1000.0
    expected_s: float | None = None
    queued: int = 0
    attached: bool = True


def test_a_recent_node_is_worth_more():
    assert worth(Facts(last_used_s=20.0), 30.0, RATES) > worth(Facts(), 2000.0, RATES)


def test_worth_halves_when_the_time_without_a_use_doubles():
    early, late = worth(Facts(), 1010.0, RATES), worth(Facts(), 1020.0, RATES)
    assert late == pytest.approx(early / 2)


def test_a_deep_token_costs_more_than_a_shallow_one():
    deep = Facts(start=8192)
    assert compute_s(deep, RATES) == pytest.approx(64e-3 * (1 + 8224 / 4096))
    assert worth(deep, 1001.0, RATES) == pytest.approx(2 * worth(Facts(), 1001.0, RATES))


def test_a_node_with_children_cannot_go():
    assert worth(Facts(num_children=1), 0.0, RATES) == math.inf


def test_what_was_used_often_is_likelier_to_be_used_until_it_is_stale():
    chances = [use_chance(Facts(num_hits=hits), 1000.0) for hits in range(6)]
    assert chances[:5] == sorted(set(chances))
    assert chances[5] == chances[4]
    assert use_chance(Facts(num_hits=4), 1000.0 + STALE_S) == chances[0]


def test_the_states_are_ranked():
    ranked = [
        Facts(state=SessionState.CLOSED),
        Facts(state=TOOL, expected_s=3600.0),
        Facts(state=TOOL, expected_s=60.0),
        Facts(state=SessionState.IDLE, expected_s=30.0),
        Facts(state=SessionState.RUNNING),
        Facts(state=TOOL, expected_s=1.0),
    ]
    worths = [worth(facts, 1000.0, RATES) for facts in ranked]
    assert worths == sorted(set(worths))
    assert next_use_s(Facts(state=SessionState.IDLE), 1000.0) is None


@pytest.mark.parametrize("state", sorted(DEAD_STATES, key=str))
def test_the_dead_are_worth_nothing(state):
    assert worth(Facts(state=state, expected_s=1.0, num_hits=9), 1000.0, RATES) == 0.0


@pytest.mark.parametrize("state", [TOOL, SessionState.RUNNING, SessionState.IDLE])
@pytest.mark.parametrize("wait_s", [0.0, 5.0])
def test_an_overdue_session_is_expected_later_and_later(state, wait_s):
    facts = Facts(state=state, expected_s=wait_s)
    now, due_s = 1000.0, next_use_s(facts, 1000.0)
    assert due_s == pytest.approx(1000.0 + wait_s + NEAREST_S)
    for _ in range(30):
        assert next_use_s(facts, math.nextafter(due_s, 0.0)) == due_s  # it stays until it passes
        now, due_s = due_s, next_use_s(facts, due_s)
        assert now < due_s <= now + 4 * (now - 1000.0)
    assert due_s > 1000.0 + 2.0**15 * (wait_s + NEAREST_S)


def test_a_tool_that_is_late_loses_its_worth():
    facts = Facts(state=TOOL, expected_s=10.0)
    assert worth(facts, 1005.0, RATES) > worth(facts, 1000.0, RATES)
    assert worth(facts, 1100.0, RATES) < worth(facts, 1000.0, RATES)


def test_a_tier_saves_what_the_way_from_below_costs_more():
    rates = TierRates(
        compute_s_per_token=1e-2, load_s_per_token=1e-3, below_load_s_per_token=4e-3, token_bytes=8
    )
    assert saving_s(Facts(is_below=True), rates) == pytest.approx(64 * 3e-3)
    assert saving_s(Facts(), rates) == pytest.approx(64 * (1e-2 * (1 + 32 / 4096) - 1e-3))
    slow = TierRates(compute_s_per_token=1e-3, load_s_per_token=2e-3)
    assert saving_s(Facts(), slow) == 0.0
    assert worth(Facts(), 1001.0, slow) == 0.0


def test_bytes_make_a_token_worth_less():
    dear = TierRates(token_bytes=2)
    assert worth(Facts(), 1001.0, dear) == pytest.approx(worth(Facts(), 1001.0, RATES) / 2)


@pytest.mark.parametrize("name", ["compute_s_per_token", "attention_knee_tokens", "token_bytes"])
def test_rates_that_divide_are_positive(name):
    with pytest.raises(ValueError, match=name):
        TierRates(**{name: 0})


def test_a_parent_inherits_the_session_that_is_expected_sooner():
    parent = Facts()
    inherit(parent, Facts(state=SessionState.CLOSED))
    assert parent.state is None
    inherit(parent, Facts(state=TOOL, expected_s=50.0))
    inherit(parent, Facts(state=SessionState.RUNNING, expected_s=90.0))
    assert (parent.state, parent.expected_s) == (TOOL, 50.0)
    inherit(parent, Facts(state=SessionState.RUNNING, expected_s=20.0, marked_s=1005.0))
    assert (parent.state, parent.marked_s) == (SessionState.RUNNING, 1005.0)


def test_an_outdated_mark_gives_way_to_a_fresh_one():
    parent = Facts(state=TOOL, expected_s=1.0, last_used_s=2000.0)
    inherit(parent, Facts(state=TOOL, expected_s=5.0, marked_s=2000.0))
    assert parent.expected_s == 5.0


def queue_of(nodes):
    queue = EvictionQueue()
    for node in nodes:
        queue.offer(node)
    return queue


def test_the_queue_yields_least_worth_first():
    nodes = [Facts(last_used_s=float(second)) for second in (5, 1, 9, 3)]
    queue = queue_of(nodes)
    queue.check(nodes)
    order = [queue.pop(10.0) for _ in range(5)]
    assert order == [nodes[1], nodes[3], nodes[0], nodes[2], None]
    assert repr(queue) == "<EvictionQueue 0 entries in 0 groups>"


def test_the_furthest_expected_use_goes_first():
    waits = (5.0, 90.0, 1.0)
    nodes = [Facts(state=TOOL, expected_s=wait_s) for wait_s in waits]
    queue = queue_of(nodes)
    assert [queue.pop(1000.0) for _ in range(3)] == [nodes[1], nodes[0], nodes[2]]


def test_a_prediction_that_passed_is_made_again():
    late, soon = Facts(state=TOOL, expected_s=1.0), Facts(state=TOOL, expected_s=300.0)
    queue = queue_of([late, soon])
    queue.offer(Facts(last_used_s=0.0))
    assert queue.pop(1000.5).state is None
    assert queue.pop(1250.0) is late  # it might take as long again, while the other is due soon


def test_the_dead_go_from_the_ends_of_their_logs():
    dead = [Facts(state=SessionState.CLOSED, start=start) for start in (64, 512, 128)]
    queue = queue_of([Facts(last_used_s=-1e9), *dead])
    assert [queue.pop(1000.0) for _ in range(3)] == [dead[1], dead[2], dead[0]]


def test_a_use_is_noticed_without_being_told():
    nodes = [Facts(last_used_s=1.0), Facts(last_used_s=2.0)]
    queue = queue_of(nodes)
    nodes[0].last_used_s = 3.0
    queue.check(nodes)
    assert [queue.pop(4.0), queue.pop(4.0)] == [nodes[1], nodes[0]]


def test_hits_that_are_long_ago_are_noticed_without_being_told():
    often, once = Facts(num_hits=4, last_used_s=0.0), Facts(last_used_s=100.0)
    queue = queue_of([often, once])
    assert queue.pop(300.0) is once
    queue.offer(once)
    assert queue.pop(STALE_S) is often


def test_a_fall_is_noticed_when_offered():
    nodes = [Facts(last_used_s=1.0), Facts(last_used_s=2.0)]
    queue = queue_of([*nodes, Facts(last_used_s=0.0)])
    queue.pop(3.0)
    nodes[1].state = SessionState.CLOSED
    with pytest.raises(CacheCorrupt, match="worth less"):
        queue.check(nodes)
    queue.offer(nodes[1])
    queue.check(nodes)
    assert [queue.pop(3.0), queue.pop(3.0), queue.pop(3.0)] == [nodes[1], nodes[0], None]


def test_gone_and_inner_nodes_do_not_come_up():
    nodes = [Facts(), Facts(), Facts()]
    queue = queue_of(nodes)
    nodes[0].attached = False
    nodes[1].num_children = 1
    assert [queue.pop(1000.0), queue.pop(1000.0)] == [nodes[2], None]
    queue.offer(nodes[1])
    assert len(queue) == 0


def test_check_misses_a_leaf():
    with pytest.raises(CacheCorrupt, match="not in the queue"):
        EvictionQueue().check([Facts()])


def test_check_counts_the_entries():
    queue = queue_of([Facts()])
    queue._num_entries = 2
    with pytest.raises(CacheCorrupt, match="counted otherwise"):
        queue.check([])


@pytest.mark.parametrize("state", [None, TOOL])
def test_entries_of_gone_nodes_do_not_pile_up(state):
    queue = EvictionQueue()
    for _ in range(1000):
        node = Facts(state=state)
        queue.offer(node)
        node.attached = False
    assert len(queue) <= 64
    assert len(queue._due) <= 64


def test_predictions_of_evicted_nodes_do_not_pile_up():
    queue = EvictionQueue()
    for _ in range(1000):
        queue.offer(Facts(state=TOOL, expected_s=3600.0))
        queue.pop(1000.0)
    assert len(queue._due) <= 64


states = st.none() | st.sampled_from(SessionState)
seconds = st.floats(0.0, 2000.0)
leaves = st.builds(
    Facts,
    start=st.integers(0, 20_000),
    num_tokens=st.integers(1, 500),
    last_used_s=seconds,
    num_hits=st.integers(0, 6),
    is_below=st.booleans(),
    state=states,
    marked_s=seconds,
    expected_s=st.none() | st.floats(0.0, 100.0),
)
below = TierRates(below_load_s_per_token=3e-4)


@settings(deadline=None)
@given(st.lists(leaves, min_size=1, max_size=20), st.data())
def test_the_queue_agrees_with_looking_at_all_leaves(nodes, data):
    """Whatever happens between evictions, the victim is one of those worth least then."""
    queue = EvictionQueue(below)
    for node in nodes:
        queue.offer(node)
    now, left = 2000.0, list(nodes)
    while left:
        now += data.draw(st.sampled_from([0.0, 0.5, 20.0, 700.0]))
        change = data.draw(st.sampled_from(["none", "use", "mark"]))
        node = data.draw(st.sampled_from(left))
        if change == "use":
            node.last_used_s, node.num_hits = now, node.num_hits + 1
            node.state = None if node.state in DEAD_STATES else node.state
        elif change == "mark":
            node.state, node.marked_s = data.draw(states), now
            node.expected_s = data.draw(st.none() | st.floats(0.0, 100.0))
            queue.offer(node)
        queue.check(left)
        victim = queue.pop(now)
        least = min(worth(node, now, below) for node in left)
        assert worth(victim, now, below) == pytest.approx(least, rel=1e-9)
        left.remove(victim)
    assert queue.pop(now) is None
