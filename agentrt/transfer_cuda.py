"""CudaCopier: KV between a GPU's pool and page-locked host memory, on a stream of its own."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from agentrt.mover import Part

READY_SLABS = 64  # of 64 MiB: what one long conversation of an 8B model keeps
NUM_MAKERS = 4  # touching pages is what takes the time, and the system does it side by side


def allocate_pinned(num_bytes: int) -> Any:
    """Page-locked memory as a numpy array.

    The pages are there before the driver locks them: it holds back every launch while it works.
    On an H100's host 64 MiB took 42 ms in the driver alone, and this way 45 ms outside of it and 4
    in it.
    """
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[:: mmap.PAGESIZE] = 0
    address = array.ctypes.data
    status = _runtime().cudaHostRegister(address, num_bytes, 0)
    if status.value != 0:
        raise MemoryError(f"the driver cannot lock {num_bytes} bytes: {status}")
    weakref.finalize(array, _unlock, address, memory)
    return array


def _unlock(address: int, memory: mmap.mmap) -> None:
    """`memory` is an argument so that it outlives the array."""
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


@define(eq=False)
class PinnedSlabs:
    """Makes page-locked slabs ahead of need, in threads that end when enough are ready: the step
    thread, which asks for them, would wait 50 ms for each.

    Owns the slabs that nobody has asked for yet; there are never more than `most_bytes` of all.
    """

    slab_bytes: int
    most_bytes: int
    _ready: deque[Any] = field(factory=deque, init=False)
    _num_made: int = field(default=0, init=False)  # or begun
    _num_begun: int = field(default=0, init=False)  # by makers, and not ready yet
    _makers: list[threading.Thread] = field(factory=list, init=False)
    _changed: threading.Condition = field(factory=threading.Condition, init=False)

    def allocate(self, num_bytes: int) -> Any:
        """A slab: of `slab_bytes`, but for the last one of a budget."""
        slab = None
        with self._changed:
            if num_bytes == self.slab_bytes:  # one that is begun comes sooner than another
                self._changed.wait_for(lambda: self._ready or not self._num_begun)
            if num_bytes == self.slab_bytes and self._ready:
                slab = self._ready.popleft()
            else:
                self._num_made += 1
            is_low = len(self._ready) < READY_SLABS // 2
        if is_low:
            self.make_ahead()
        return allocate_pinned(num_bytes) if slab is None else slab

    def make_ahead(self) -> None:
        """Have READY_SLABS ready soon, as far as the budget goes."""
        if not any(maker.is_alive() for maker in self._makers):
            device = torch.cuda.current_device()
            self._makers = [
                threading.Thread(target=self._make, args=(device,), name="agentrt-pin")
                for _ in range(NUM_MAKERS)
            ]
            for maker in self._makers:
                maker.start()

    def _make(self, device: int) -> None:
        torch.cuda.set_device(device)
        while self._begin():
            try:
                slab = allocate_pinned(self.slab_bytes)
            except MemoryError:  # whoever asks next gets the error
                with self._changed:
                    self._num_begun -= 1
                    self._num_made -= 1
                    self._changed.notify_all()
                return
            with self._changed:
                self._num_begun -= 1
                self._ready.append(slab)
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Whether one more is wanted, which is then counted as made."""
        with self._changed:
            has_room = (self._num_made + 1) * self.slab_bytes <= self.most_bytes
            if not has_room or len(self._ready) + self._num_begun >= READY_SLABS:
                return False
            self._num_made += 1
            self._num_begun += 1
            return True


@define(eq=False)
class CudaCopier:
    """See `agentrt.transfer.Copier`. pool: [layers, 2, blocks, kv_heads, block_tokens, dim].

    `begin` orders a job behind all that the step thread has launched: what a save reads is written
    then, and what a load overwrites is read. Only the transfer thread uses the stream.
    """

    pool: Tensor
    stream: torch.cuda.Stream

    @classmethod
    def over(cls, pool: Tensor) -> CudaCopier:
        return cls(pool, torch.cuda.Stream(pool.device))  # type: ignore[no-untyped-call]

    def begin(self) -> torch.cuda.Event:
        """Mark what must be done before a job: called by the step thread when it hands one over."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.pool.device))
        return event

    @torch.inference_mode()
    def save(self, part: Part, block_ids: tuple[int, ...], after: Any) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            places = part.places(self.pool.shape[4], block_ids)
            chunk = torch.cat([self._place(block, at, num) for block, at, _, num in places], 3)
            torch.from_numpy(part.view).copy_(
                chunk.contiguous().view(torch.uint8).view(-1), non_blocking=True
            )

    @torch.inference_mode()
    def load(self, part: Part, source: Any, block_ids: tuple[int, ...], after: Any) -> None:
        layers, _, _, heads, block_tokens, dim = self.pool.shape
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            raw = torch.from_numpy(source).to(self.pool.device, non_blocking=True)
            chunk = raw.view(self.pool.dtype).view(layers, 2, heads, part.num_tokens, dim)
            for block, offset, inside, num in part.places(block_tokens, block_ids):
                self._place(block, offset, num).copy_(chunk[:, :, :, inside : inside + num])

    def sync(self) -> None:
        self.stream.synchronize()

    def _place(self, block: int, offset: int, num: int) -> Tensor:
        return self.pool[:, :, block, :, offset : offset + num]
