"""The token masks of a step's grammars, filled beside the forward that computes its logits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from agentrt.grammar import Constraint, fill_masks

if TYPE_CHECKING:
    from llguidance import LLExecutor

    from agentrt.grammar import MaskRow

# A row of logits and what it needs: the place in a grammar, if there is one, and the tokens of the
# draft, each of which has a row of its own behind it.
Asked = tuple[Constraint | None, list[int]]


@frozen
class Filling:
    """Masks that are asked for."""

    asked: Sequence[Asked]
    _masks: Future[list[MaskRow | None]] = field(factory=Future)

    def masks(self) -> list[MaskRow | None]:
        """One for each row of logits, waited for; None where there is no grammar, or where the
        draft cannot come to."""
        return self._masks.result()

    def fill(self, executor: LLExecutor) -> None:
        try:
            self._masks.set_result(fill_masks(executor, self.asked))
        except BaseException as exc:
            self._masks.set_exception(exc)  # the step thread meets it, and fails every waiter


@define(eq=False)
class MaskThread:
    """Fills masks on a thread of its own, which begins with the first grammar; llguidance frees the
    GIL, so that a forward goes on beside it.

    Invariant: from `begin` until the filling's masks are there, nobody else uses its constraints.
    """

    _jobs: SimpleQueue[Filling | None] = field(factory=SimpleQueue, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def begin(self, asked: Sequence[Asked]) -> Filling | None:
        """Ask for a step's masks. Never waits; None where no row has a grammar."""
        if all(constraint is None for constraint, _ in asked):
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="agentrt-masks", daemon=True)
            self._thread.start()
        filling = Filling(asked)
        self._jobs.put(filling)
        return filling

    def close(self) -> None:
        """End the thread, and wait for it."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _main(self) -> None:
        from llguidance import LLExecutor

        executor = LLExecutor()
        while (filling := self._jobs.get()) is not None:
            filling.fill(executor)
