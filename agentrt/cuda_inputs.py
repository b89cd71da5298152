"""What a step needs on the device besides weights: block tables, and small arrays of the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from agentrt.cache import Lease
from agentrt.scheduler import Work

NUM_BUFFERS = 3  # of a step: one runs, one waits, one is being filled
UPLOADS_PER_STEP = 3
ALIGNED = 4  # int32 numbers: kernels are compiled for pointers to multiples of 16 bytes


@define
class Uploader:
    """Copies int32 arrays to the device in one transfer, without waiting.

    Owns page-locked buffers in a ring. Invariant: when a buffer comes round again, the step that
    it was filled for has been collected (a step uploads at most UPLOADS_PER_STEP times).
    """

    device: torch.device
    _buffers: list[Tensor] = field(init=False)
    _next: int = 0

    @_buffers.default
    def _empty(self) -> list[Tensor]:
        return [torch.empty(0, dtype=torch.int32) for _ in range(NUM_BUFFERS * UPLOADS_PER_STEP)]

    def upload(self, arrays: Sequence[NDArray[np.int32]]) -> list[Tensor]:
        """Each array as an aligned int32 tensor."""
        lengths = [-(-len(array) // ALIGNED) * ALIGNED for array in arrays]
        buffer = self._take(sum(lengths))
        values, start = buffer.numpy(), 0
        for array, length in zip(arrays, lengths, strict=True):
            values[start : start + len(array)] = array
            start += length
        flat = torch.empty(start, dtype=torch.int32, device=self.device)
        flat.copy_(buffer[:start], non_blocking=True)
        parts = torch.split(flat, lengths)
        return [part[: len(array)] for part, array in zip(parts, arrays, strict=True)]

    def upload_to(self, target: Tensor, array: NDArray[np.int32]) -> None:
        """Overwrite `target` with an array of its length."""
        buffer = self._take(len(array))
        buffer.numpy()[: len(array)] = array
        target.copy_(buffer[: len(array)], non_blocking=True)

    def _take(self, num: int) -> Tensor:
        self._next = (self._next + 1) % len(self._buffers)
        if len(self._buffers[self._next]) < num:
            is_cuda = self.device.type == "cuda"  # else kernels are interpreted
            fresh = torch.empty(2 * num, dtype=torch.int32, pin_memory=is_cuda)
            self._buffers[self._next] = fresh
        return self._buffers[self._next]


@define
class BlockTables:
    """Block tables of the running requests, one slot each, and the token that each sampled last.

    Owns `tables` [slots, blocks] and `last_tokens` [slots] on the device. A slot belongs to a
    lease from one plan to the next. Invariant: after `place`, each slot's table holds all blocks
    of its lease. The last slot is nobody's: idle rows of a graph point at it.
    """

    num_slots: int
    num_blocks: int  # of the longest context
    device: torch.device
    tables: Tensor = field(init=False)
    last_tokens: Tensor = field(init=False)
    _slots: dict[Lease, int] = field(factory=dict, init=False)
    _free: list[int] = field(init=False)
    _counts: list[int] = field(init=False)  # blocks that a slot's table holds

    def __attrs_post_init__(self) -> None:
        shape = (self.num_slots + 1, self.num_blocks)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.last_tokens = torch.zeros(self.num_slots + 1, dtype=torch.int32, device=self.device)
        self._free = list(range(self.num_slots))
        self._counts = [0] * self.num_slots

    @property
    def idle_slot(self) -> int:
        return self.num_slots

    def place(self, works: Sequence[Work]) -> tuple[list[int], list[int], list[int]]:
        """Each work's slot; and which cells of the flat tables change, to what."""
        leases = [lease for work in works if (lease := work.request.lease) is not None]
        assert len(leases) == len(works)
        self._drop_others(set(leases))
        slots = [self._slot(lease) for lease in leases]
        cells: list[int] = []
        blocks: list[int] = []
        for lease, slot in zip(leases, slots, strict=True):
            count, have = len(lease.block_ids), self._counts[slot]
            if count > have:
                first = slot * self.num_blocks
                cells += range(first + have, first + count)
                blocks += lease.block_ids[have:]
                self._counts[slot] = count
        return slots, cells, blocks

    def _slot(self, lease: Lease) -> int:
        if lease not in self._slots:
            self._slots[lease] = self._free.pop()
        return self._slots[lease]

    def _drop_others(self, leases: set[Lease]) -> None:
        for lease in [lease for lease in self._slots if lease not in leases]:
            slot = self._slots.pop(lease)
            self._counts[slot] = 0
            self._free.append(slot)
