"""What steps need of a GPU beside its kernels: graphs of them, and word that a step is done."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from agentrt.cache.disk_table import paused_collector


class Event(Protocol):
    """A mark behind the work that was launched before it was recorded."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@frozen
class Captured:
    """A step as a graph. Replaying it computes anew, from the memory that its inputs lie in."""

    replay: Callable[[], None]
    logits: Tensor  # what the step gave, and every replay gives
    pool: Any = None  # the graph's memory, which others may share that never run beside it


class StepDevice(Protocol):
    """A GPU; in tests without one, the interpreter of its kernels."""

    def capture(self, compute: Callable[[], Tensor], pool: Any = None) -> Captured:
        """Compile all kernels of a step, and record it. `pool`: of an earlier graph."""

    def event(self) -> Event:
        """An event of this device."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""


@frozen
class CudaDevice:
    """The current CUDA device."""

    def capture(self, compute: Callable[[], Tensor], pool: Any = None) -> Captured:
        compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = compute()
        return Captured(graph.replay, logits, pool or graph.pool())

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out: page-locked memory of an engine before, let go by the thread
    that captures, ends the capture with an error."""
    gc.collect()
    with paused_collector():
        yield
