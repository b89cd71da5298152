import math

import pytest
from attrs import define

from agentrt.cache.evict import (
    DEAD_STATES,
    EvictionQueue,
    SessionState,
    keep_until_s,
    recompute_cost_tokens,
    state_credit_s,
    worth_s,
)
from agentrt.errors import CacheCorrupt


@define(eq=False)
class Facts:
    start: int = 0
    num_tokens: int = 64
    num_children: int = 0
    last_used_s: float = 1000.0
    state: SessionState | None = None
    expected_s: float | None = None
    queued_s: float | None = None
    attached: bool = True


def test_a_recent_node_is_worth_more():
    assert worth_s(Facts(last_used_s=20.0), 30.0) > worth_s(Facts(last_used_s=10.0), 30.0)


def test_worth_falls_as_time_goes_by():
    assert worth_s(Facts(), 1010.0) == pytest.approx(worth_s(Facts(), 1000.0) - 10.0)


def test_a_deep_token_costs_more_than_a_shallow_one():
    assert recompute_cost_tokens(Facts(start=4096)) > recompute_cost_tokens(Facts())
    assert worth_s(Facts(start=4096), 0.0) > worth_s(Facts(), 0.0)


def test_a_long_node_costs_more_than_a_short_one():
    assert worth_s(Facts(num_tokens=100), 0.0) > worth_s(Facts(num_tokens=10), 0.0)


def test_a_node_with_children_cannot_go():
    assert worth_s(Facts(num_children=1), 0.0) == math.inf


def test_the_states_are_ranked():
    ranked = [
        Facts(state=SessionState.CLOSED),
        Facts(state=SessionState.IDLE),
        Facts(state=SessionState.TOOL_PENDING, expected_s=3600.0),
        Facts(state=SessionState.TOOL_PENDING),
        Facts(state=SessionState.TOOL_PENDING, expected_s=1.0),
        Facts(state=SessionState.RUNNING),
    ]
    worths = [worth_s(facts, 1000.0) for facts in ranked]
    assert worths == sorted(set(worths))
    assert state_credit_s(Facts()) == 0.0


@pytest.mark.parametrize("state", sorted(DEAD_STATES, key=str))
def test_the_dead_go_before_all_others(state):
    assert keep_until_s(Facts(state=state, last_used_s=1e9)) < keep_until_s(Facts(last_used_s=0.0))


def queue_of(nodes):
    queue = EvictionQueue()
    for node in nodes:
        queue.offer(node)
    return queue


def test_the_queue_yields_least_worth_first():
    nodes = [Facts(last_used_s=float(second)) for second in (5, 1, 9, 3)]
    queue = queue_of(nodes)
    queue.check(nodes)
    assert [queue.pop() for _ in range(5)] == [nodes[1], nodes[3], nodes[0], nodes[2], None]


def test_a_use_is_noticed_without_being_told():
    nodes = [Facts(last_used_s=1.0), Facts(last_used_s=2.0)]
    queue = queue_of(nodes)
    nodes[0].last_used_s = 3.0
    queue.check(nodes)
    assert [queue.pop(), queue.pop()] == [nodes[1], nodes[0]]


def test_a_fall_is_noticed_when_offered():
    nodes = [Facts(last_used_s=1.0), Facts(last_used_s=2.0)]
    queue = queue_of(nodes)
    nodes[1].state = SessionState.CLOSED
    with pytest.raises(CacheCorrupt, match="worth less"):
        queue.check(nodes)
    queue.offer(nodes[1])
    assert [queue.pop(), queue.pop(), queue.pop()] == [nodes[1], nodes[0], None]


def test_gone_and_inner_nodes_do_not_come_up():
    nodes = [Facts(), Facts(), Facts()]
    queue = queue_of(nodes)
    nodes[0].attached = False
    nodes[1].num_children = 1
    assert [queue.pop(), queue.pop()] == [nodes[2], None]
    queue.offer(nodes[1])
    assert len(queue) == 0


def test_check_misses_a_leaf():
    with pytest.raises(CacheCorrupt, match="not in the queue"):
        EvictionQueue().check([Facts()])


def test_entries_of_gone_nodes_do_not_pile_up():
    queue = EvictionQueue()
    for _ in range(1000):
        node = Facts()
        queue.offer(node)
        node.attached = False
    assert len(queue) <= 64
