"""Int8Packing: KV on disk in half the bytes or a quarter, at the price of its last bits."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from attrs import frozen

from agentrt.cache.tier import Buffer

LARGEST = 127
_SCALE_BYTES = 4

FloatName = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[FloatName, int] = {"float32": 4, "bfloat16": 2}


@frozen
class Int8Packing:
    """Rows of `row_items` numbers that lie side by side: their ratios to the row's largest in int8,
    and that in float32. With a head's size for `row_items` a row is a token's keys or values of one
    head, or as many numbers of a group of tokens (see `kernels.kv_layout`).

    Symmetric, rounded to nearest: an error of at most 1/254 of the row's largest number. Packed is
    all int8 of a payload, then all scales.
    """

    dtype: FloatName
    row_items: int

    def packed_bytes(self, num_bytes: int) -> int:
        """What a payload of `num_bytes` takes when packed."""
        return num_bytes // (self.row_items * ITEM_BYTES[self.dtype]) * self._packed_row_bytes

    def plain_bytes(self, packed_bytes: int) -> int:
        """The inverse."""
        return packed_bytes // self._packed_row_bytes * self.row_items * ITEM_BYTES[self.dtype]

    @property
    def _packed_row_bytes(self) -> int:
        return self.row_items + _SCALE_BYTES

    def pack(self, payload: Sequence[Buffer]) -> list[Buffer]:
        """The buffers' numbers, one buffer behind the other."""
        raw = np.concatenate([_bytes_of(buffer) for buffer in payload])
        rows = self._floats(raw).reshape(-1, self.row_items)
        scale = np.abs(rows).max(axis=1) / np.float32(LARGEST)
        steps = np.divide(rows, scale[:, None], out=np.zeros_like(rows), where=scale[:, None] > 0)
        return [np.rint(steps, out=steps).astype(np.int8), scale]

    def unpack(self, packed: Buffer, into: Sequence[Buffer]) -> None:
        """Fill the buffers with a payload's numbers."""
        raw = _bytes_of(packed)
        num_rows = len(raw) // self._packed_row_bytes
        steps, scale = np.split(raw, [num_rows * self.row_items])
        rows = steps.view(np.int8).reshape(num_rows, self.row_items).astype(np.float32)
        rows *= scale.copy().view(np.float32)[:, None]
        plain, begin = self._bytes(rows), 0
        for buffer in into:
            target = _bytes_of(buffer)
            target[:] = plain[begin : begin + len(target)]
            begin += len(target)

    def _floats(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if self.dtype == "float32":
            return raw.view(np.float32)
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16  # a bfloat16 is the upper half of a float32
        return wide.view(np.float32)

    def _bytes(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        if self.dtype == "bfloat16":
            wide = rows.view(np.uint32)
            wide += 0x7FFF + ((wide >> 16) & 1)  # to nearest, ties to even
            return (wide >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        return rows.reshape(-1).view(np.uint8)


def _bytes_of(buffer: Buffer) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memoryview(buffer).cast("B"), np.uint8)
