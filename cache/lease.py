"""What a running request holds: its blocks, and the copies that must be made for it."""

from typing import final

from attrs import frozen

from agentrt.cache.node import Node, TokenArray


@frozen
class Copy:
    """Copy the first `num_tokens` tokens of block `source` to block `target`.

    The caller does it on the device before its next forward, in the order in which the cache
    handed copies out: a later one may read or overwrite what an earlier one wrote or read.
    """

    source: int
    target: int
    num_tokens: int


@final
class Lease:
    """The blocks of one running request. Made and changed by PrefixCache only.

    Block i of `block_ids` holds tokens [i * block_tokens, (i + 1) * block_tokens). The request
    may write from `num_tokens` on, nothing before.
    """

    __slots__ = (
        "_leaf",
        "_live",
        "_namespace",
        "_token_ids",
        "_writes",
        "block_ids",
        "num_cached_tokens",
        "num_tokens",
    )

    def __init__(
        self, token_ids: TokenArray, block_ids: list[int], namespace: str, *, writes: bool = True
    ) -> None:
        self.block_ids = block_ids
        self.num_tokens = len(token_ids)
        self.num_cached_tokens = len(token_ids)
        self._token_ids = token_ids  # those whose KV is present
        self._namespace = namespace
        self._leaf: Node | None = None  # what this lease inserted last
        self._live = True
        self._writes = writes

    def __repr__(self) -> str:
        state = "live" if self._live else "released"
        return f"<Lease {state}, {self.num_tokens} tokens in {len(self.block_ids)} blocks>"
