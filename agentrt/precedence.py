"""Precedence: the step thread before whatever else runs Python in its engine.

All threads of a process share one interpreter lock, and a long prefill is launched kernel by
kernel: beside a save 4,000 such calls took 1.5 to 2 times as long as alone (2 busy cores;
`python benchmarks/admission.py --launches 4000`). So that work is done in small units, and waits
before each one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from attrs import define, field

# Background work is held back no longer than this, so it goes on under any load. A cold prompt of
# 32,768 tokens takes 0.3 s (1B shape) or 1.3 s (8B).
MOST_HELD_S = 1.0
# Blocks that saves keep from others are a share of the pool of at most 1 in so many, as long as
# the saves are held back.
HELD_POOL_SHARE = 8


def never() -> bool:
    """Nothing is urgent."""
    return False


@define(eq=False)
class Precedence:
    """A gate before each unit of background work. The step thread holds it while it prepares or
    launches a step, and while a first token is awaited; it lets go while it waits for the device or
    for something to do. See `agentrt.cache.tier.Gate` for the other side.

    `_is_held` is written without the lock: the step thread must not wait here. That is sound as
    whoever waits has counted itself before it looks, and `rest` looks at the count after it wrote.
    """

    most_held_s: float = MOST_HELD_S
    clock: Callable[[], float] = time.monotonic
    _is_held: bool = field(default=False, init=False)
    _num_waiting: int = field(default=0, init=False)
    _changed: threading.Condition = field(factory=threading.Condition, init=False)

    # ---- the step thread, and whoever gives it work

    def work(self) -> None:
        """The step thread has something to do. Never waits."""
        self._is_held = True

    def rest(self, *, is_awaited: bool) -> None:
        """The step thread is about to wait; `is_awaited` tells whether a caller waits for a first
        token meanwhile."""
        self._is_held = is_awaited
        if not is_awaited:
            self.look_again()

    # ---- background threads

    def pass_(self, since_s: float, is_urgent: Callable[[], bool] = never) -> None:
        """Wait until the step thread lets go, `is_urgent` says so, or the work that began at
        `since_s` was held back for long enough. `is_urgent` must not lock anything."""
        if not self._is_held:
            return
        with self._changed:
            self._num_waiting += 1
            try:
                while self._is_held and not is_urgent():
                    left_s = since_s + self.most_held_s - self.clock()
                    if left_s <= 0:
                        break
                    self._changed.wait(left_s)
            finally:
                self._num_waiting -= 1

    def look_again(self) -> None:
        """Something may have become urgent."""
        if self._num_waiting:
            with self._changed:
                self._changed.notify_all()
