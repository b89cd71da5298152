"""TransferThread: copies KV between the device's pool and the tiers below it, beside the steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from attrs import define, field, frozen

from agentrt.kernels.kv_layout import KvLayout, PlainLayout

if TYPE_CHECKING:
    import numpy.typing as npt

    from agentrt.cache.tier import Gate, Tier
    from agentrt.mover import Demotion, Job, Part

    Bytes = npt.NDArray[np.uint8]

# Takes the seconds that each tier took, None where the disk missed, or a bug.
Done = Callable[["Job", dict[str, float] | Exception | None], None]


class Copier(Protocol):
    """Moves one chunk's bytes. `begin` is called by the step thread, when it hands a job over: the
    job's moves come after all that this thread has launched. `sync` waits until they are done."""

    def begin(self) -> Any: ...

    def save(self, part: Part, block_ids: tuple[int, ...], after: Any) -> None: ...

    def load(self, part: Part, source: Any, block_ids: tuple[int, ...], after: Any) -> None: ...

    def sync(self) -> None: ...


@define
class HostCopier:
    """Copies where the pool is in host memory. numpy frees the GIL and starts no threads: torch
    would give this thread a second OpenMP pool (see `step_thread`).

    pool: bytes [layers, 2, blocks, kv_heads, block_tokens, dim * item bytes].
    A chunk's bytes: [layers, 2, kv_heads, tokens, dim * item bytes].
    """

    pool: Bytes
    layout: KvLayout = field(factory=PlainLayout)

    def begin(self) -> None:
        """Steps are done when they return."""

    def save(self, part: Part, block_ids: tuple[int, ...], after: None) -> None:
        chunk = self._shaped(part.view, part)
        for block_id, offset, inside, num in part.places(self.pool.shape[4], block_ids):
            self.layout.to_chunk(self.pool[:, :, block_id], offset, chunk, inside, num)

    def load(self, part: Part, source: Bytes, block_ids: tuple[int, ...], after: None) -> None:
        chunk = self._shaped(source, part)
        for block_id, offset, inside, num in part.places(self.pool.shape[4], block_ids):
            self.layout.to_block(chunk, inside, self.pool[:, :, block_id], offset, num)

    def sync(self) -> None:
        """Copies are done when they return."""

    def _shaped(self, chunk: Bytes, part: Part) -> Bytes:
        layers, _, _, heads, _, row_bytes = self.pool.shape
        return chunk.reshape(layers, 2, heads, part.num_tokens, row_bytes)


@frozen
class Queued:
    """A job, and what it comes after; `since_s` is when it was handed over."""

    job: Job
    after: Any
    since_s: float


@define(eq=False)
class TransferThread:
    """Carries out jobs one after the other, loads before saves, and also between a save's parts:
    someone waits for a load.

    With a `gate`, saves wait there before each part; not beyond the end, nor while the saves that
    are queued keep more than `most_held_blocks` from others. `_changed` guards the queues,
    `_saving_blocks` and `_closed`; `done` is called on this thread.
    """

    copier: Copier
    disk: Tier | None
    done: Done
    clock: Callable[[], float] = time.monotonic
    gate: Gate | None = None
    most_held_blocks: int = 0
    _loads: deque[Queued] = field(factory=deque, init=False)
    _saves: deque[Queued] = field(factory=deque, init=False)
    _saving_blocks: int = field(default=0, init=False)  # of saves that have not ended
    _changed: threading.Condition = field(factory=threading.Condition, init=False)
    _closed: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def submit(self, job: Job) -> None:
        """Queue a job. Never waits."""
        since_s = self.clock() if self.gate is None else self.gate.clock()
        queued = Queued(job, self.copier.begin(), since_s)
        with self._changed:
            (self._loads if job.is_load else self._saves).append(queued)
            self._saving_blocks += 0 if job.is_load else len(job.block_ids)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._main, name="agentrt-transfer", daemon=True
                )
                self._thread.start()
            self._changed.notify()
        self._hurry()

    def save_now(self, demotion: Demotion) -> None:
        """Save on the caller's thread, which is the one that runs the steps; done on return."""
        after = self.copier.begin()
        for part in demotion.parts:
            self.copier.save(part, demotion.block_ids, after)

    def close(self) -> None:
        """Finish the jobs that are queued, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._hurry()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        while (queued := self._next()) is not None:
            self._carry_out(queued)

    def _carry_out(self, queued: Queued) -> None:
        job = queued.job
        try:
            result: dict[str, float] | Exception | None = self._run(queued)
        except Exception as exc:
            result = exc  # raised again on the step thread, which fails every waiter
        with self._changed:
            self._saving_blocks -= 0 if job.is_load else len(job.block_ids)
        self.done(job, result)

    def _hurry(self) -> None:
        if self.gate is not None:
            self.gate.look_again()

    def _is_urgent(self) -> bool:
        """Whether a save must not be held back. Reads single values, and needs no lock."""
        return self._closed or bool(self._loads) or self._saving_blocks > self.most_held_blocks

    def _give_way(self, since_s: float) -> None:
        """Before a part of a save that was queued at `since_s`."""
        while True:
            if self.gate is not None:
                self.gate.pass_(since_s, self._is_urgent)
            with self._changed:
                if not self._loads:
                    return
                load = self._loads.popleft()
            self._carry_out(load)

    def _next(self) -> Queued | None:
        with self._changed:
            while not self._loads and not self._saves:
                if self._closed:
                    return None
                self._changed.wait()
            return self._loads.popleft() if self._loads else self._saves.popleft()

    def _run(self, queued: Queued) -> dict[str, float] | None:
        job, after = queued.job, queued.after
        seconds: dict[str, float] = {}
        for part in job.parts:
            if not job.is_load:
                self._give_way(queued.since_s)
            begin = self.clock()
            if not job.is_load:
                self.copier.save(part, job.block_ids, after)
            elif part.record is None:
                self.copier.load(part, part.view, job.block_ids, after)
            elif not self._load_from_disk(part, job.block_ids, after):
                return None
            seconds[part.tier] = seconds.get(part.tier, 0.0) + self.clock() - begin
        self.copier.sync()
        return seconds

    def _load_from_disk(self, part: Part, block_ids: tuple[int, ...], after: Any) -> bool:
        assert self.disk is not None
        assert part.record is not None
        bytes_read = np.empty(part.record.num_bytes, dtype=np.uint8)
        if not self.disk.read(part.record, [bytes_read]):
            return False
        self.copier.load(part, bytes_read, block_ids, after)
        return True
