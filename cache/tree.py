"""A radix tree over token ids: which prefix lies in which blocks.

Invariant of sharing: a block that a node holds for block index i contains valid KV of ALL tokens
of index i on the node's path, from i * block_tokens up to the node's end; also of those tokens
that belong to ancestors. Where two nodes of a path hold different blocks for one index (the
sequence diverged inside a block and went on in a copy), only the deeper node's block is right for
the whole of it. So whoever reads a path takes, for each index, the block of the DEEPEST node.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from agentrt.cache.blocks import BlockPool
from agentrt.cache.evict import DEAD_STATES, EvictionQueue, SessionState, TierRates, inherit
from agentrt.cache.node import Evicted, Match, Node, TokenArray, num_common
from agentrt.errors import CacheCorrupt


class RadixTree:
    """Owner of the nodes, of their references to blocks, and of the `committed` marks.

    Nothing here changes a lease. A leaf is shortened from its end, never into a leased block.
    Invariant: see `check` and the head of this file.
    """

    def __init__(self, pool: BlockPool, rates: TierRates | None = None) -> None:
        self.on_evict: Callable[[Evicted, float], None] | None = None
        self.num_nodes = 0
        self.num_tokens = 0
        self._pool = pool
        self._block_tokens = pool.block_tokens
        self._roots: dict[str, Node] = {}  # those with children only
        self._queue: EvictionQueue[Node] = EvictionQueue(rates)

    def match(self, token_ids: TokenArray, namespace: str) -> Match:
        """Find the longest prefix of `token_ids` in the tree; one comparison per edge."""
        node = self._roots.get(namespace)
        path: list[Node] = []
        position = 0
        while node is not None and position < len(token_ids):
            child = node.children.get(int(token_ids[position]))
            if child is None:
                break
            path.append(child)
            edge = child.tokens
            position += num_common(edge, token_ids[position : position + len(edge)])
            node = child if position == child.end else None
        return Match(path, position)

    def continuation(self, match: Match, namespace: str) -> TokenArray:
        """The tokens behind a match up to the next end of a node, along the latest used edge."""
        if match.is_inside:
            return match.path[-1].tokens[match.num_tokens - match.path[-1].start :]
        node = match.path[-1] if match.path else self._roots.get(namespace)
        if node is None or not node.children:
            return np.empty(0, np.int32)
        return max(node.children.values(), key=lambda child: child.last_used_s).tokens

    def blocks(self, path: list[Node], num_tokens: int) -> list[int]:
        """Blocks with the KV of the first `num_tokens` of `path`: the deepest node's for each."""
        blocks: list[int] = []
        for node in path:
            if node.start >= num_tokens:
                break
            first = node.start // self._block_tokens
            del blocks[first:]
            blocks += node.blocks[: self._num_blocks(min(node.end, num_tokens)) - first]
        return blocks

    def insert(
        self,
        token_ids: TokenArray,
        blocks: Sequence[int],
        namespace: str,
        now: float,
        own_leaf: Node | None,
    ) -> Node | None:
        """Add what is missing of `token_ids`, whose KV lies in `blocks`; return the last node.

        Tokens that the tree has stay in the blocks where it has them. `own_leaf` is what the last
        insert of the same lease returned: it grows, while another's leaf gets a child, so that a
        node's state never spans what two sessions wrote.
        """
        match = self.match(token_ids, namespace)
        for node in match.path[:-1]:
            node.use(now)
        if match.num_tokens == len(token_ids):
            if match.path:
                match.path[-1].use(now)
            return match.path[-1] if match.path else None
        if match.is_inside:
            node = self._split(match.path[-1], match.num_tokens)
            node.num_hits += 1  # a second sequence runs through this half, and not the other
        else:
            node = match.path[-1] if match.path else self._root(namespace)
        node.use(now)
        if node is own_leaf and not node.children and node.state in (None, SessionState.RUNNING):
            return self._grow(node, token_ids, blocks)
        return self._branch(node, token_ids, blocks, now)

    def cut(self, leaf: Node, end: int) -> int:
        """Shorten a leaf to `end` as far as no lease holds its blocks; return tokens dropped."""
        old_end, new_end = leaf.end, self._free_from(leaf, max(end, leaf.start))
        if new_end == old_end:
            return 0
        if new_end == leaf.start:
            self._remove(leaf)
        else:
            self._shorten(leaf, new_end)
        self.num_tokens -= old_end - new_end
        return old_end - new_end

    def _free_from(self, leaf: Node, end: int) -> int:
        """From where on no lease holds a block of the leaf, if that is behind `end`."""
        first, new_end = leaf.start // self._block_tokens, leaf.end
        while new_end > end:
            index = (new_end - 1) // self._block_tokens
            if self._pool.leases[leaf.blocks[index - first]]:
                break
            new_end = max(end, index * self._block_tokens)
        return new_end

    def cut_up(self, leaf: Node, end: int) -> int:
        """Cut a leaf, then its ancestors as far as they become leaves; return tokens dropped."""
        num_tokens = 0
        node: Node | None = leaf
        while node is not None and node.attached and not node.children and node.end > end:
            parent = node.parent
            num_tokens += self.cut(node, end)
            node = None if node.attached else parent
        return num_tokens

    def forget(self, token_ids: TokenArray, keep_tokens: int, namespace: str) -> int:
        """Drop the end of this path down to `keep_tokens`; return tokens dropped."""
        match = self.match(token_ids, namespace)
        if not match.path or match.is_inside:
            return 0  # another sequence runs through all of it
        return self.cut_up(match.path[-1], keep_tokens)

    def clear(self) -> None:
        """Drop all that no lease holds."""
        for leaf in [node for node in self.nodes() if not node.children]:
            self.cut_up(leaf, 0)

    def reclaim(self, num_free: int, now: float) -> int:
        """Cut the leaves of least worth until `num_free` blocks are free; return tokens dropped.

        Cuts no more blocks than are short, and fewer than asked when leases hold the rest.
        """
        num_tokens = 0
        leased = []
        while self._pool.num_free < num_free and (leaf := self._queue.pop(now)) is not None:
            num_kept = self._num_blocks(leaf.end) - (num_free - self._pool.num_free)
            end = max(leaf.start, num_kept * self._block_tokens)
            self._tell(leaf, end, now)
            dropped = self.cut(leaf, end)
            num_tokens += dropped
            if not dropped:
                leased.append(leaf)
        for leaf in leased:
            self._queue.offer(leaf)
        return num_tokens

    def _tell(self, leaf: Node, end: int, now: float) -> None:
        """Let the owner keep elsewhere what a cut to `end` will drop."""
        start = self._free_from(leaf, end)
        if self.on_evict is None or start == leaf.end:
            return
        path = leaf.path()
        evicted = Evicted(
            token_ids=np.concatenate([node.tokens for node in path]),
            start=start,
            block_ids=self.blocks(path, leaf.end),
            leaf=leaf,
        )
        self.on_evict(evicted, now)

    def adopt(self, token_ids: TokenArray, blocks: Sequence[int], namespace: str) -> None:
        """Let the nodes of a lease's path hold its blocks where theirs are leased by nobody.

        A lease that computed what the tree had already keeps a second copy. The tree's copy then
        cannot go, being above the lease's own leaf; with this it can.
        """
        for node in self.match(token_ids, namespace).path:
            if node.end > len(token_ids):
                break
            first = node.start // self._block_tokens
            for place, held in enumerate(node.blocks):
                if held != blocks[first + place] and not self._pool.leases[held]:
                    self._replace(node, place, blocks[first + place])

    def mark(
        self,
        token_ids: TokenArray,
        state: SessionState,
        expected_s: float | None,
        now: float,
        namespace: str,
    ) -> None:
        """Note the state of the session whose log is `token_ids` where its path ends."""
        match = self.match(token_ids, namespace)
        if not match.path:
            return
        node = match.path[-1]
        if match.is_inside:
            if state in DEAD_STATES or match.num_tokens < len(token_ids):
                return  # the rest of this edge is another log's, which is not known to be dead
            node = self._split(node, match.num_tokens)
        if state in DEAD_STATES:
            self._mark_dead(node, state)
            return
        node.use(now)
        node.state, node.marked_s, node.expected_s = state, now, expected_s
        self._queue.offer(node)
        self._unmark_above(node)

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check(self) -> None:
        """Raise CacheCorrupt unless the tree is well formed and its counts are right."""
        nodes = list(self.nodes())
        for node in nodes:
            self._check_node(node)
        if any(root.end or not root.children for root in self._roots.values()):
            raise CacheCorrupt("a root has tokens or no children")
        num_tokens = sum(node.num_tokens for node in nodes)
        if (len(nodes), num_tokens) != (self.num_nodes, self.num_tokens):
            raise CacheCorrupt(f"{len(nodes)} nodes, {num_tokens} tokens; counted otherwise")
        self._queue.check(node for node in nodes if not node.children)
        committed = [0] * self._pool.num_blocks
        for node in nodes:
            for block, num_covered in self._coverage(node):
                committed[block] = max(committed[block], num_covered)
        if committed != self._pool.committed:
            raise CacheCorrupt("a committed mark differs from what the nodes cover")

    def _check_node(self, node: Node) -> None:
        parent = node.parent
        if parent is None or not node.num_tokens or node.start != parent.end:
            raise CacheCorrupt(f"{node!r} does not join its parent {parent!r}")
        if parent.children.get(int(node.tokens[0])) is not node:
            raise CacheCorrupt(f"{node!r} is filed under another token")
        num_blocks = self._num_blocks(node.end) - node.start // self._block_tokens
        if len(node.blocks) != num_blocks or len(set(node.blocks)) != num_blocks:
            raise CacheCorrupt(f"{node!r} needs {num_blocks} blocks")

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = Node(
                namespace=namespace,
                parent=None,
                tokens=np.empty(0, np.int32),
                start=0,
                blocks=[],
                last_used_s=0.0,
            )
            self._roots[namespace] = root
        return root

    def _branch(
        self, parent: Node, token_ids: TokenArray, blocks: Sequence[int], now: float
    ) -> Node:
        start = parent.end
        node = Node(
            namespace=parent.namespace,
            parent=parent,
            tokens=token_ids[start:].copy(),
            start=start,
            blocks=list(blocks[start // self._block_tokens : self._num_blocks(len(token_ids))]),
            last_used_s=now,
        )
        parent.children[int(node.tokens[0])] = node
        self.num_nodes += 1
        self.num_tokens += node.num_tokens
        self._pool.retain_all(node.blocks)
        self._cover(node, 0)
        self._queue.offer(node)
        return node

    def _grow(self, leaf: Node, token_ids: TokenArray, blocks: Sequence[int]) -> Node:
        index, num_blocks = self._num_blocks(leaf.end), self._num_blocks(len(token_ids))
        place = len(leaf.blocks) - 1
        if leaf.end % self._block_tokens and leaf.blocks[-1] != blocks[index - 1]:
            self._replace(leaf, place, blocks[index - 1])
        self.num_tokens += len(token_ids) - leaf.end
        leaf.tokens = np.concatenate((leaf.tokens, token_ids[leaf.end :]))
        fresh = blocks[index:num_blocks]
        self._pool.retain_all(fresh)
        leaf.blocks += fresh
        self._cover(leaf, place)
        return leaf

    def _split(self, node: Node, position: int) -> Node:
        """Cut an edge in two at `position`; return the upper half, which is the new node."""
        parent = node.parent
        assert parent is not None
        offset = position - node.start
        first = node.start // self._block_tokens
        upper = Node(
            namespace=node.namespace,
            parent=parent,
            tokens=node.tokens[:offset].copy(),
            start=node.start,
            blocks=node.blocks[: self._num_blocks(position) - first],
            last_used_s=node.last_used_s,
            num_hits=node.num_hits,
            is_below=node.is_below,
            children={int(node.tokens[offset]): node},
        )
        parent.children[int(node.tokens[0])] = upper
        node.parent = upper
        node.tokens = node.tokens[offset:].copy()
        node.start = position
        node.blocks = node.blocks[position // self._block_tokens - first :]
        if position % self._block_tokens:
            self._pool.retain(node.blocks[0])  # both halves hold the block of the cut
        self.num_nodes += 1
        self._queue.offer(node)
        return upper

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        block, index = leaf.blocks[0], leaf.start // self._block_tokens
        self._pool.committed[block] = leaf.covered_above(block, index * self._block_tokens)
        self._pool.release_all(leaf.blocks)
        del parent.children[int(leaf.tokens[0])]
        leaf.parent = None
        self.num_nodes -= 1
        if parent.attached:
            inherit(parent, leaf)
            self._queue.offer(parent)
        elif not parent.children:
            del self._roots[parent.namespace]

    def _shorten(self, leaf: Node, end: int) -> None:
        num_kept = self._num_blocks(end) - leaf.start // self._block_tokens
        self._pool.release_all(leaf.blocks[num_kept:])
        del leaf.blocks[num_kept:]
        leaf.tokens = leaf.tokens[: end - leaf.start].copy()
        # A leaf is the deepest holder of its blocks, so the mark may fall with its end.
        self._pool.committed[leaf.blocks[-1]] = (end - 1) % self._block_tokens + 1
        self._queue.offer(leaf)

    def _replace(self, node: Node, place: int, block: int) -> None:
        """Let `node` hold `block` instead of the one at `place`; both have the same KV."""
        old = node.blocks[place]
        index = node.start // self._block_tokens + place
        if self._pool.committed[old] == min(
            node.end - index * self._block_tokens, self._block_tokens
        ):
            # No deeper node holds it, or the mark were higher.
            self._pool.committed[old] = node.covered_above(old, index * self._block_tokens)
        node.blocks[place] = block
        self._pool.retain(block)
        self._pool.release(old)
        self._cover(node, place)

    def _coverage(self, node: Node, place: int = 0) -> Iterator[tuple[int, int]]:
        """Blocks of `node` from `place` on, with how many of their tokens are before its end."""
        begin = (node.start // self._block_tokens + place) * self._block_tokens
        for block in node.blocks[place:]:
            yield block, min(node.end - begin, self._block_tokens)
            begin += self._block_tokens

    def _cover(self, node: Node, place: int) -> None:
        committed = self._pool.committed
        for block, num_covered in self._coverage(node, place):
            if committed[block] < num_covered:
                committed[block] = num_covered

    def _mark_dead(self, node: Node, state: SessionState) -> None:
        if node.children:
            node.state = None  # others go on from here
            return
        node.state = state
        self._queue.offer(node)
        for ancestor in node.chain_above():
            if ancestor.state not in (None, SessionState.RUNNING):
                break  # another session's log ends here
            ancestor.state = state

    def _unmark_above(self, node: Node) -> None:
        # A running session's end moves down; where it was while it ran is no log's end now.
        for ancestor in node.chain_above():
            if ancestor.state is SessionState.RUNNING:
                ancestor.state = None
