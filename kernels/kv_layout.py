"""How the KV of a block's tokens lies in the pool, and copies that may begin and end anywhere.

A pool is [layers, 2, blocks, kv_heads, block_tokens, dim]; `PlainLayout` is what that says. The
native CPU kernels keep tokens in groups of 16 instead, in the same memory, so that nothing has to
be moved before it is multiplied: a group's keys are [units of dim][16 tokens], its values [units of
16 tokens][dim], a unit being 32 bits (one float32, or two bfloat16). Reading a context of 7,000
tokens so took 3.0 ms of arithmetic instead of 6.0 (SmolLM2, 2 cores).

A chunk, which a tier below the device keeps, is [layers, 2, kv_heads, tokens, dim]: whole groups as
they are in the pool, and what is behind the last whole group as plain tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

UNIT_BYTES = 4
GROUP_TOKENS = 16  # GROUP of native_tile.h


class KvLayout(Protocol):
    """Copies `num` tokens between a block (from token `offset`) and a chunk (from `inside`).

    block, chunk: bytes [layers, 2, kv_heads, tokens, dim * item bytes], which may be views.
    """

    @property
    def name(self) -> str:
        """Tells stores of different layouts apart."""

    @property
    def group_tokens(self) -> int:
        """Tokens that lie interleaved: a block is a multiple of it, and a chunk begins at one."""

    def to_chunk(self, block: Bytes, offset: int, chunk: Bytes, inside: int, num: int) -> None: ...

    def to_block(self, chunk: Bytes, inside: int, block: Bytes, offset: int, num: int) -> None: ...


@frozen
class PlainLayout:
    """Token after token."""

    name: str = "plain"
    group_tokens: int = 1

    def to_chunk(self, block: Bytes, offset: int, chunk: Bytes, inside: int, num: int) -> None:
        chunk[..., inside : inside + num, :] = block[..., offset : offset + num, :]

    def to_block(self, chunk: Bytes, inside: int, block: Bytes, offset: int, num: int) -> None:
        block[..., offset : offset + num, :] = chunk[..., inside : inside + num, :]


@frozen
class GroupLayout:
    """Groups of `group_tokens`, see above. `item_bytes` is a number's: 2 or 4."""

    item_bytes: int
    group_tokens: int = GROUP_TOKENS

    @property
    def name(self) -> str:
        return f"groups of {self.group_tokens}"

    def to_chunk(self, block: Bytes, offset: int, chunk: Bytes, inside: int, num: int) -> None:
        for in_block, in_chunk in self._places(block, offset, chunk, inside, num):
            in_chunk[...] = in_block

    def to_block(self, chunk: Bytes, inside: int, block: Bytes, offset: int, num: int) -> None:
        for in_block, in_chunk in self._places(block, offset, chunk, inside, num):
            in_block[...] = in_chunk

    def _places(
        self, block: Bytes, offset: int, chunk: Bytes, inside: int, num: int
    ) -> Iterator[tuple[Bytes, Bytes]]:
        """Views of the same numbers in the block and in the chunk: whole groups, single tokens."""
        for first, end, is_whole in self._runs(inside, inside + num):
            at = offset + first - inside
            if is_whole:
                yield block[..., at : at + end - first, :], chunk[..., first:end, :]
                continue
            for token in range(end - first):
                yield from self._token_places(block, at + token, chunk, first + token)

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(first, end, whole groups?) of a chunk's tokens first .. end, in order."""
        group = self.group_tokens
        whole_first, whole_end = -(-first // group) * group, end // group * group
        if whole_first >= whole_end:
            yield first, end, False
            return
        if first < whole_first:
            yield first, whole_first, False
        yield whole_first, whole_end, True
        if whole_end < end:
            yield whole_end, end, False

    def _token_places(
        self, block: Bytes, at: int, chunk: Bytes, inside: int
    ) -> Iterator[tuple[Bytes, Bytes]]:
        num_grouped = chunk.shape[-2] // self.group_tokens * self.group_tokens
        for which in (0, 1):
            in_block = self._token(block[:, which], at, is_value=which == 1)
            own = chunk[:, which]
            if inside < num_grouped:
                yield in_block, self._token(own, inside, is_value=which == 1)
            else:
                yield in_block, own[..., inside, :].reshape(in_block.shape)

    def _token(self, tokens: Bytes, index: int, *, is_value: bool) -> Bytes:
        """A view of one token of bytes [layers, kv_heads, whole groups of tokens, dim bytes]."""
        layers, heads, _, row_bytes = tokens.shape
        group, inside = divmod(index, self.group_tokens)
        first = group * self.group_tokens
        one = tokens[:, :, first : first + self.group_tokens]
        if not is_value:
            units = one.reshape(layers, heads, -1, self.group_tokens, UNIT_BYTES)
            return units[:, :, :, inside]
        per_unit = UNIT_BYTES // self.item_bytes
        dim = row_bytes // self.item_bytes
        pairs = one.reshape(layers, heads, -1, dim, per_unit, self.item_bytes)
        return pairs[:, :, inside // per_unit, :, inside % per_unit]
