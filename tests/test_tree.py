import numpy as np
import pytest

from agentrt.cache.blocks import BlockPool
from agentrt.cache.evict import SessionState
from agentrt.cache.tree import RadixTree
from agentrt.errors import CacheCorrupt


def ids(*parts):
    """Token ids: a range for each (first, last) pair, single ids as they are."""
    tokens = []
    for part in parts:
        tokens += range(*part) if isinstance(part, tuple) else [part]
    return np.array(tokens, np.int32)


class Bench:
    """A tree of 4-token blocks, and inserts whose writer goes at once."""

    def __init__(self, num_blocks=32):
        self.pool = BlockPool(num_blocks, 4)
        self.tree = RadixTree(self.pool)

    def insert(self, tokens, blocks=None, now=0.0, namespace="", own_leaf=None):
        if blocks is None:
            blocks = self.pool.allocate(-(-len(tokens) // 4))
            self.tree.insert(tokens, blocks, namespace, now, own_leaf)
            self.pool.release_all(blocks)
        else:
            self.tree.insert(tokens, blocks, namespace, now, own_leaf)
        self.tree.check()
        self.pool.check()
        return blocks

    def find(self, tokens, namespace=""):
        match = self.tree.match(tokens, namespace)
        return self.tree.blocks(match.path, match.num_tokens)

    def edges(self):
        return sorted((node.start, node.end) for node in self.tree.nodes())


@pytest.fixture
def bench():
    return Bench()


def test_a_match_is_exact_to_the_token(bench):
    bench.insert(ids((0, 10)))
    assert bench.tree.match(ids((0, 7), 99), "").num_tokens == 7
    assert bench.tree.match(ids((0, 20)), "").num_tokens == 10
    assert bench.tree.match(ids(5), "").num_tokens == 0
    assert bench.tree.match(ids(), "").num_tokens == 0


def test_namespaces_are_apart(bench):
    bench.insert(ids((0, 8)), namespace="one")
    assert bench.tree.match(ids((0, 8)), "two").path == []
    bench.tree.clear()
    assert bench.tree._roots == {}


def test_a_divergence_splits_the_edge_inside_a_block(bench):
    old = bench.insert(ids((0, 10)))
    new = bench.insert(ids((0, 6), (50, 54)))
    assert bench.edges() == [(0, 6), (6, 10), (6, 10)]
    assert bench.find(ids((0, 10))) == old
    # From the branch on, the branch's own block serves for all of index 1: it has the copy.
    assert bench.find(ids((0, 6), (50, 54))) == [old[0], new[1], new[2]]
    assert bench.find(ids((0, 6))) == old[:2]


def test_the_deepest_nodes_block_serves_though_another_lies_between(bench):
    first = bench.pool.allocate(2)
    second = bench.pool.allocate(1)
    bench.insert(ids((0, 2)), first)
    bench.insert(ids((0, 3)), second)
    bench.insert(ids((0, 6)), first)
    assert bench.find(ids((0, 6))) == first
    assert bench.find(ids((0, 3))) == second
    assert bench.pool.committed[first[0]] == 4
    bench.pool.release_all(first + second)
    (leaf,) = [node for node in bench.tree.nodes() if not node.children]
    bench.tree.cut(leaf, 3)
    assert bench.pool.committed[first[0]] == 2
    bench.tree.check()


def test_the_own_leaf_grows_and_anothers_gets_a_child(bench):
    blocks = bench.pool.allocate(3)
    leaf = bench.tree.insert(ids((0, 6)), blocks, "", 0.0, None)
    assert bench.tree.insert(ids((0, 9)), blocks, "", 1.0, leaf) is leaf
    child = bench.tree.insert(ids((0, 12)), blocks, "", 1.0, None)
    assert child.parent is leaf
    assert bench.edges() == [(0, 9), (9, 12)]
    assert bench.find(ids((0, 12))) == blocks
    bench.tree.check()


def test_a_growing_leaf_takes_over_a_copied_block(bench):
    old, new = bench.pool.allocate(2), bench.pool.allocate(3)
    leaf = bench.tree.insert(ids((0, 6)), old, "", 0.0, None)
    bench.tree.insert(ids((0, 10)), new, "", 0.0, leaf)
    assert bench.find(ids((0, 10))) == [old[0], new[1], new[2]]
    assert bench.pool.references[old[1]] == 1
    bench.tree.check()


def test_a_leaf_is_cut_from_its_end_and_not_into_leased_blocks(bench):
    blocks = bench.insert(ids((0, 18)))
    bench.pool.lease(blocks[:2])
    (leaf,) = bench.tree.nodes()
    assert bench.tree.cut(leaf, 15) == 3
    assert bench.tree.cut(leaf, 0) == 7
    assert bench.tree.cut(leaf, 0) == 0
    assert leaf.end == 8
    bench.tree.check()


def test_reclaim_takes_only_what_is_short_of_the_least_worthy(bench):
    bench.insert(ids((0, 16)), now=1.0)
    bench.insert(ids((100, 116)), now=2.0)
    assert bench.pool.num_free == 24
    assert bench.tree.reclaim(27, 9.0) == 12
    assert bench.pool.num_free == 27
    assert bench.tree.match(ids((0, 16)), "").num_tokens == 4
    assert bench.tree.match(ids((100, 116)), "").num_tokens == 16
    assert bench.tree.reclaim(32, 9.0) == 20
    bench.tree.check()


def test_reclaim_leaves_what_is_leased(bench):
    blocks = bench.insert(ids((0, 16)))
    bench.pool.lease(blocks)
    assert bench.tree.reclaim(32, 9.0) == 0
    bench.tree.check()
    bench.pool.end_lease(blocks)
    assert bench.tree.reclaim(32, 9.0) == 16


def test_forget_stops_where_another_path_begins(bench):
    bench.insert(ids((0, 6), (60, 70)))
    bench.insert(ids((0, 6), (80, 90)))
    assert bench.tree.forget(ids((0, 6)), 0, "") == 0
    assert bench.tree.forget(ids((0, 6), (60, 65)), 0, "") == 0
    assert bench.tree.forget(ids((0, 6), (60, 70)), 7, "") == 9
    assert bench.tree.forget(ids((0, 6), 60), 2, "") == 1
    assert bench.tree.forget(ids((0, 6), (80, 90)), 2, "") == 14
    assert bench.edges() == [(0, 2)]
    bench.tree.check()


def test_adopt_frees_second_copies(bench):
    kept = bench.insert(ids((0, 6)))
    own = bench.pool.allocate(3)
    bench.pool.claim(own, "lease")
    bench.insert(ids((0, 10)), own)
    bench.tree.adopt(ids((0, 10)), own, "")
    assert bench.find(ids((0, 10))) == own
    assert [bench.pool.references[block] for block in kept] == [0, 0]
    bench.tree.check()


def state_at(bench, tokens):
    return bench.tree.match(tokens, "").path[-1].state


def test_a_mark_sits_where_the_log_ends(bench):
    bench.insert(ids((0, 6)))
    bench.tree.mark(ids((0, 6)), SessionState.RUNNING, None, 1.0, "")
    bench.insert(ids((0, 12)))
    bench.tree.mark(ids((0, 13)), SessionState.TOOL_PENDING, 5.0, 2.0, "")
    assert state_at(bench, ids((0, 12))) is SessionState.TOOL_PENDING
    assert state_at(bench, ids((0, 6))) is None
    bench.tree.mark(ids((0, 9)), SessionState.IDLE, None, 3.0, "")
    assert bench.edges() == [(0, 6), (6, 9), (9, 12)]
    assert state_at(bench, ids((0, 9))) is SessionState.IDLE
    bench.tree.check()


def test_a_closed_log_does_not_doom_what_others_use(bench):
    bench.insert(ids((0, 4)))
    bench.insert(ids((0, 8)))
    bench.tree.mark(ids((0, 8)), SessionState.IDLE, None, 1.0, "")
    bench.insert(ids((0, 12)))
    bench.insert(ids((0, 16)))
    bench.tree.mark(ids((0, 10)), SessionState.CLOSED, None, 2.0, "")  # inside an edge
    assert state_at(bench, ids((0, 12))) is None
    bench.tree.mark(ids((0, 16)), SessionState.CLOSED, None, 2.0, "")
    assert state_at(bench, ids((0, 16))) is SessionState.CLOSED
    assert state_at(bench, ids((0, 12))) is SessionState.CLOSED
    assert state_at(bench, ids((0, 8))) is SessionState.IDLE
    bench.tree.mark(ids((0, 8)), SessionState.CLOSED, None, 3.0, "")  # others go on from there
    assert state_at(bench, ids((0, 8))) is None
    bench.tree.check()


def test_a_use_revives_the_dead(bench):
    bench.insert(ids((0, 8)))
    bench.tree.mark(ids((0, 8)), SessionState.SUPERSEDED, None, 1.0, "")
    bench.insert(ids((0, 8)), now=2.0)
    assert state_at(bench, ids((0, 8))) is None


def test_the_closed_go_first(bench):
    bench.insert(ids((0, 16)), now=9.0)
    bench.insert(ids((100, 116)), now=1.0)
    bench.tree.mark(ids((0, 16)), SessionState.CLOSED, None, 9.0, "")
    bench.tree.reclaim(28, 9.0)
    assert bench.edges() == [(0, 16)]
    assert bench.tree.match(ids((100, 116)), "").num_tokens == 16


def test_a_cut_log_leaves_its_state_to_what_is_left(bench):
    bench.insert(ids((0, 16)))
    bench.insert(ids((0, 8), (50, 58)))
    bench.insert(ids((0, 8), (70, 78)))
    bench.tree.mark(ids((0, 8), (50, 58)), SessionState.TOOL_PENDING, 5.0, 1.0, "")
    bench.tree.mark(ids((0, 8), (70, 78)), SessionState.TOOL_PENDING, 90.0, 2.0, "")
    bench.tree.forget(ids((0, 16)), 8, "")
    assert state_at(bench, ids((0, 8))) is None
    bench.tree.forget(ids((0, 8), (50, 58)), 8, "")
    bench.tree.forget(ids((0, 8), (70, 78)), 8, "")
    (node,) = bench.tree.nodes()
    assert (node.state, node.expected_s, node.marked_s) == (SessionState.TOOL_PENDING, 5.0, 1.0)
    bench.tree.check()


def test_a_second_sequence_counts_as_a_use_of_the_shared_half(bench):
    bench.insert(ids((0, 16)))
    bench.insert(ids((0, 8), (50, 58)))
    hits = {(node.start, node.num_hits) for node in bench.tree.nodes()}
    assert hits == {(0, 1), (8, 0)}


def test_marks_of_unknown_logs_change_nothing(bench):
    bench.tree.mark(ids((0, 8)), SessionState.IDLE, None, 1.0, "")
    bench.insert(ids((0, 8)))
    bench.tree.mark(ids((0, 4), 77), SessionState.IDLE, None, 1.0, "")
    assert bench.edges() == [(0, 8)]
    assert state_at(bench, ids((0, 8))) is None


def _shift(bench, node):
    node.start += 1


def _misfile(bench, node):
    node.parent.children[1000] = node.parent.children.pop(0)


def _lose_a_block(bench, node):
    node.blocks.pop()


def _miscount(bench, node):
    bench.tree.num_tokens += 1


def _overcommit(bench, node):
    bench.pool.committed[node.blocks[-1]] += 1


def _leave_a_root(bench, node):
    bench.tree._root("empty")


@pytest.mark.parametrize(
    "corrupt", [_shift, _misfile, _lose_a_block, _miscount, _overcommit, _leave_a_root]
)
def test_check_notices(bench, corrupt):
    bench.insert(ids((0, 7)))
    (node,) = bench.tree.nodes()
    corrupt(bench, node)
    with pytest.raises(CacheCorrupt):
        bench.tree.check()
