"""Deferred: what the step thread does once transfers have ended. No thread, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from attrs import define, field, frozen

from agentrt.mover import Job

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")


@frozen
class _Waiting:
    jobs: set[Job]
    run: Callable[[], None]
    fail: Callable[[Exception], None]


@define
class Deferred:
    """Owned by the step thread. Those that have nothing to wait for are run by `run_ready`."""

    _waiting: list[_Waiting] = field(factory=list, init=False)

    def add(
        self, jobs: set[Job], run: Callable[[], None], fail: Callable[[Exception], None]
    ) -> None:
        """Call `run` when all of these jobs have ended, or `fail` if they never will."""
        self._waiting.append(_Waiting(jobs, run, fail))

    def ended(self, job: Job) -> None:
        """Nobody waits for this job any more."""
        for waiting in self._waiting:
            waiting.jobs.discard(job)

    def run_ready(self) -> None:
        """Run those whose jobs have all ended, in the order of their coming."""
        ready = [waiting for waiting in self._waiting if not waiting.jobs]
        self._waiting = [waiting for waiting in self._waiting if waiting.jobs]
        for waiting in ready:
            waiting.run()

    def fail(self, error: Exception) -> None:
        """Tell whoever still waits."""
        for waiting in self._waiting:
            waiting.fail(error)


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Run a function for whoever waits for the future, if anyone still does."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as exc:
        future.set_exception(exc)
