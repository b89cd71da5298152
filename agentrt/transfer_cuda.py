"""CudaCopier: KV between a GPU's pool and page-locked host memory, on a stream of its own."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from agentrt.cache.tier import Gate
from agentrt.mover import Part

# Of 64 MiB. While slabs are made beside them, prefill steps are launched late: a prompt of 32,768
# tokens (1B shape) took 538 ms on an H100 with 64 ready, and 298 with 300. So most are made at the
# start, when a model is loaded and compiled, and the others while no first token is awaited, unless
# few are left.
READY_SLABS = 256
FEW_SLABS = 32
NUM_MAKERS = 4  # touching pages is what takes the time, and the system does it side by side


def allocate_pinned(num_bytes: int) -> Any:
    """Page-locked memory as a numpy array.

    The pages are there before the driver locks them: it holds back every launch while it works.
    On an H100's host 64 MiB took 42 ms in the driver alone; this way 18 ms outside of it and 2.4 in
    it. Private memory gets large pages there, shared memory does not (52 and 4.2 ms).
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a child must not take the device's pages
        if hasattr(mmap, advice):
            memory.madvise(getattr(mmap, advice))
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
    thread, which asks for them, would wait 20 ms for each.

    Owns the slabs that nobody has asked for yet; there are never more than `most_bytes` of all.
    With a `gate`, each waits there before it is begun, as long as more than FEW_SLABS are ready.
    """

    slab_bytes: int
    most_bytes: int
    gate: Gate | None = None
    _ready: deque[Any] = field(factory=deque, init=False)
    _num_made: int = field(default=0, init=False)  # or begun
    _num_begun: int = field(default=0, init=False)  # by makers, and not ready yet
    _makers: list[threading.Thread] = field(factory=list, init=False)
    _is_closed: bool = field(default=False, init=False)
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
            self._begin_making()
            if self.gate is not None:
                self.gate.look_again()
        return allocate_pinned(num_bytes) if slab is None else slab

    def make_ahead(self) -> None:
        """Have READY_SLABS ready on return, as far as the budget goes: 3 s for 16 GiB. Beside steps
        it would take longer, and a decode step of 1 ms 3.6."""
        self._begin_making()
        for maker in self._makers:
            maker.join()

    def close(self) -> None:
        """End the makers, and let go of what nobody asked for. One that was still in the driver
        when the interpreter ended would end the process with an error."""
        self._is_closed = True
        if self.gate is not None:
            self.gate.look_again()
        for maker in self._makers:
            maker.join()
        self._ready.clear()

    def _begin_making(self) -> None:
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
        while self._wants_more():
            if self.gate is not None:
                self.gate.pass_(self.gate.clock(), self._is_urgent)
            if not self._begin():  # another maker has
                return
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

    def _is_urgent(self) -> bool:
        """Whether a maker must not be held back. Reads single values, and needs no lock."""
        return self._is_closed or len(self._ready) < FEW_SLABS

    def _wants_more(self) -> bool:
        has_room = (self._num_made + 1) * self.slab_bytes <= self.most_bytes
        return not self._is_closed and has_room and len(self._ready) + self._num_begun < READY_SLABS

    def _begin(self) -> bool:
        """Whether one more is wanted, which is then counted as made."""
        with self._changed:
            if not self._wants_more():
                return False
            self._num_made += 1
            self._num_begun += 1
            return True


class _Copy3d(ctypes.Structure):
    """CUDA_MEMCPY3D of the driver's interface."""

    _fields_ = [
        *((f"source_{name}", ctypes.c_size_t) for name in ("x", "y", "z", "level")),
        ("source_kind", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("reserved_0", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("source_height", ctypes.c_size_t),
        *((f"target_{name}", ctypes.c_size_t) for name in ("x", "y", "z", "level")),
        ("target_kind", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("reserved_1", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("target_height", ctypes.c_size_t),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    ]


HOST, DEVICE = 1, 2  # CU_MEMORYTYPE
MOST_BYTES_QUEUED = 16 << 20  # a copy that someone else needs waits behind no more


@define(eq=False)
class CudaCopier:
    """See `agentrt.transfer.Copier`. pool: [layers, 2, blocks, kv_heads, block_tokens, dim].

    `begin` orders a job behind all that the step thread has launched: what a save reads is written
    then, and what a load overwrites is read. Only the transfer thread uses the stream.

    A block is copied by the device's copy engine in one call, which takes nothing from the steps
    beside it: on an H100 49 GB/s and 10 us of a CPU for 64 tokens of a 1B model, where gathering
    them on the multiprocessors first made 25 GB/s and took 82 us.
    """

    pool: Tensor
    stream: torch.cuda.Stream
    driver: Any  # libcuda
    _copies: dict[tuple[bool, int], _Copy3d] = field(init=False)  # by whether it loads, and kind
    _bytes_queued: int = field(default=0, init=False)
    _behind: Any = field(default=None, init=False)  # the last event that was waited for

    @classmethod
    def over(cls, pool: Tensor) -> CudaCopier:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuMemcpy3DAsync_v2.argtypes = [ctypes.POINTER(_Copy3d), ctypes.c_void_p]
        return cls(pool, torch.cuda.Stream(pool.device), driver)  # type: ignore[no-untyped-call]

    @_copies.default
    def _prepared(self) -> dict[tuple[bool, int], _Copy3d]:
        """What all copies have in common: the rows of a block's heads, one head after the other."""
        layers, _, blocks, heads, block_tokens, _ = self.pool.shape
        pitch, height = block_tokens * self._row_bytes, blocks * heads
        shape = {"height": heads, "depth": 2 * layers}
        save = _Copy3d(
            source_kind=DEVICE,
            source_pitch=pitch,
            source_height=height,
            target_kind=HOST,
            target_height=heads,
            **shape,
        )
        loads = {
            (True, kind): _Copy3d(
                source_kind=kind,
                source_height=heads,
                target_kind=DEVICE,
                target_pitch=pitch,
                target_height=height,
                **shape,
            )
            for kind in (HOST, DEVICE)
        }
        return {(False, HOST): save, **loads}

    def begin(self) -> torch.cuda.Event:
        """Mark what must be done before a job: called by the step thread when it hands one over."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.pool.device))
        return event

    def save(self, part: Part, block_ids: tuple[int, ...], after: Any) -> None:
        self._wait(after)
        for pool, at, width_bytes in self._places(part, block_ids):
            copy = self._copies[False, HOST]
            copy.source_device, copy.target_host = pool, part.view.ctypes.data + at
            copy.target_pitch = part.num_tokens * self._row_bytes
            self._queue(copy, width_bytes)

    def load(self, part: Part, source: Any, block_ids: tuple[int, ...], after: Any) -> None:
        self._wait(after)
        staged = None
        if source is not part.view:  # memory that is not locked: nothing may read it later
            with torch.cuda.stream(self.stream):
                staged = torch.from_numpy(source).to(self.pool.device, non_blocking=True)
        for pool, at, width_bytes in self._places(part, block_ids):
            copy = self._copies[True, HOST if staged is None else DEVICE]
            if staged is None:
                copy.source_host = source.ctypes.data + at
            else:
                copy.source_device = staged.data_ptr() + at
            copy.target_device = pool
            copy.source_pitch = part.num_tokens * self._row_bytes
            self._queue(copy, width_bytes)

    def sync(self) -> None:
        self.stream.synchronize()
        self._bytes_queued = 0

    def _wait(self, after: Any) -> None:
        """Order what follows behind an event; a job's parts have one in common."""
        if after is not self._behind:
            self.stream.wait_event(after)
            self._behind = after

    @property
    def _row_bytes(self) -> int:
        return self.pool.shape[5] * self.pool.element_size()

    def _places(self, part: Part, block_ids: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """Of each block: an address in the pool, the offset in the chunk [layers, 2, kv_heads,
        tokens, dim], and the bytes of a head."""
        _, _, _, heads, block_tokens, _ = self.pool.shape
        row_bytes, first = self._row_bytes, self.pool.data_ptr()
        for block, offset, inside, num in part.places(block_tokens, block_ids):
            at = (block * heads * block_tokens + offset) * row_bytes
            yield first + at, inside * row_bytes, num * row_bytes

    def _queue(self, copy: _Copy3d, width_bytes: int) -> None:
        copy.width_bytes = width_bytes
        status = self.driver.cuMemcpy3DAsync_v2(ctypes.byref(copy), self.stream.cuda_stream)
        if status:
            raise RuntimeError(f"the driver does not copy KV (error {status})")
        self._bytes_queued += width_bytes * copy.height * copy.depth
        if self._bytes_queued > MOST_BYTES_QUEUED:
            self.sync()
