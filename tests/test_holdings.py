"""Which tier holds what, and that each tier's queue knows what the other changed."""

import numpy as np

from agentrt.cache.chunk import ChunkIndex
from agentrt.cache.evict import SessionState
from agentrt.cache.holdings import Holdings
from agentrt.cache.host import HostTier
from agentrt.cache.keys import raw_tokens

ROOT = b"r" * 16


def test_what_a_chunk_inherits_in_one_tier_counts_in_the_other_too():
    """The end of a log leaves the host; the chunk before it is on disk as well, and its session
    will not come back for long."""
    index, host = ChunkIndex(ROOT, 4), HostTier(4 * 16, 16)
    holdings = Holdings(index, host, None, None)
    above = index.add(index.root, raw_tokens(np.arange(4)), now=0.0)
    below = index.add(above, raw_tokens(np.arange(4, 8)), now=0.0)
    for chunk, tier in ((above, "host"), (above, "disk"), (below, "host")):
        slot = host.take() if tier == "host" else -1
        holdings.hold(chunk, tier, slot).is_ready = True
    below.state, below.marked_s, below.expected_s = SessionState.TOOL_PENDING, 0.0, 10_000.0
    holdings.offer(below)
    holdings.check()
    holdings.let_go(below, "host")
    assert above.state is SessionState.TOOL_PENDING
    holdings.check()
