"""The thread that does an engine's tensor work, from loading to the last step. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from agentrt.loop import Loop


class HasLoop(Protocol):
    """Something that a step thread can be opened for."""

    @property
    def loop(self) -> Loop: ...


P = TypeVar("P", bound=HasLoop)


def open_on_step_thread(build: Callable[[], P]) -> Future[P]:
    """Run `build` on a new thread, which then runs the steps of the loop that it made.

    One thread does all of an engine's tensor work because libgomp gives every thread a pool of its
    own: once the pools have more threads than the machine has cores, their workers sleep between
    parallel regions. With loading on a second thread each step took 1.8 times as long (2 cores).
    """
    future: Future[P] = Future()
    future.set_running_or_notify_cancel()

    def live() -> None:
        try:
            built = build()
            steps = built.loop.adopt_thread()
        except BaseException as exc:
            future.set_exception(exc)
            return
        future.set_result(built)
        steps()

    threading.Thread(target=live, name="agentrt-step", daemon=True).start()
    return future
