"""The host tier: KV of chunks in RAM, in slots of equal size under a hard budget."""

from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt

from agentrt.errors import CacheCorrupt

Bytes = npt.NDArray[np.uint8]
SLAB_BYTES = 64 << 20  # memory is taken in steps of this, and kept to the end


def allocate_pages(num_bytes: int) -> Bytes:
    """Memory that the system backs page by page as it is written."""
    return np.zeros(num_bytes, dtype=np.uint8)


@final
class HostTier:
    """Slots of `slot_bytes`, as many as the budget holds.

    A slot holds one chunk, a short one too: no fragments, and the budget is exact. State: the slabs
    (memory, never given back before the end, so that resident memory is flat) and the free slots.
    `allocate` makes a slab: pinned memory where the device is a GPU.
    """

    def __init__(
        self,
        budget_bytes: int,
        slot_bytes: int,
        allocate: Callable[[int], Any] = allocate_pages,
    ) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = budget_bytes // slot_bytes
        self._allocate = allocate
        self._slots_per_slab = max(1, SLAB_BYTES // slot_bytes)
        self._slabs: list[Any] = []
        self._num_made = 0  # slots that were ever handed out: the others have no memory yet
        self._free: list[int] = []

    def __repr__(self) -> str:
        return f"<HostTier {self.num_used} of {self.num_slots} slots used>"

    @property
    def num_used(self) -> int:
        return self._num_made - len(self._free)

    @property
    def used_bytes(self) -> int:
        return self.num_used * self.slot_bytes

    @property
    def reserved_bytes(self) -> int:
        """Memory taken from the system: never more than the budget."""
        return sum(slab.nbytes for slab in self._slabs)

    def take(self) -> int | None:
        """A free slot, or None."""
        if self._free:
            return self._free.pop()
        if self._num_made == self.num_slots:
            return None
        if self._num_made == len(self._slabs) * self._slots_per_slab:
            num_slots = min(self._slots_per_slab, self.num_slots - self._num_made)
            self._slabs.append(self._allocate(num_slots * self.slot_bytes))
        self._num_made += 1
        return self._num_made - 1

    def give(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def view(self, slot: int, num_bytes: int) -> Any:
        """The first bytes of a slot: a view of what `allocate` made."""
        slab, place = divmod(slot, self._slots_per_slab)
        begin = place * self.slot_bytes
        return self._slabs[slab][begin : begin + num_bytes]

    def wipe(self, slot: int) -> None:
        """Overwrite a slot."""
        self.view(slot, self.slot_bytes)[:] = 0

    def check(self) -> None:
        """Raise CacheCorrupt unless the free slots are distinct and exist."""
        if len(set(self._free)) != len(self._free) or self._num_made > self.num_slots:
            raise CacheCorrupt(f"the slots are wrong: {self!r}")
        if any(not 0 <= slot < self._num_made for slot in self._free):
            raise CacheCorrupt("a free slot was never made")
