"""Page-locked slabs made ahead of need; the memory itself is ordinary here."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from agentrt import transfer_cuda
from agentrt.precedence import Precedence
from agentrt.transfer_cuda import FEW_SLABS, READY_SLABS, PinnedSlabs

SLAB = 1000


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that made slabs."""
    names: list[str] = []

    def allocate(num_bytes: int) -> Any:
        names.append(threading.current_thread().name)
        return np.zeros(num_bytes, dtype=np.uint8)

    monkeypatch.setattr(transfer_cuda, "allocate_pinned", allocate)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return names


def wait(slabs: PinnedSlabs) -> None:
    for maker in slabs._makers:
        maker.join(10)
        assert not maker.is_alive()


def test_slabs_are_ready_before_they_are_asked_for(made: list[str]) -> None:
    slabs = PinnedSlabs(SLAB, 1000 * SLAB)
    slabs.make_ahead()
    wait(slabs)
    assert len(made) == READY_SLABS
    taken = [slabs.allocate(SLAB) for _ in range(READY_SLABS // 2 + 1)]
    wait(slabs)
    assert len({id(slab) for slab in taken}) == len(taken)
    assert len(slabs._ready) == READY_SLABS
    assert threading.current_thread().name not in made


def test_makers_wait_at_the_gate_until_few_slabs_are_left(made: list[str]) -> None:
    gate = Precedence(most_held_s=60.0)
    slabs = PinnedSlabs(SLAB, 1000 * SLAB, gate)
    slabs.make_ahead()
    gate.work()
    kept = READY_SLABS - FEW_SLABS
    taken = [slabs.allocate(SLAB) for _ in range(kept)]
    assert any(maker.is_alive() for maker in slabs._makers)
    assert len(made) == READY_SLABS
    taken += [slabs.allocate(SLAB) for _ in range(FEW_SLABS)]  # few are left: they hurry
    assert len({id(slab) for slab in taken}) == READY_SLABS
    gate.rest(is_awaited=False)
    wait(slabs)
    assert len(slabs._ready) == READY_SLABS


def test_all_slabs_together_stay_within_the_budget(made: list[str]) -> None:
    slabs = PinnedSlabs(SLAB, 10 * SLAB + 300)
    slabs.make_ahead()
    wait(slabs)
    assert len(made) == 10
    sizes = [slabs.allocate(SLAB).nbytes for _ in range(10)] + [slabs.allocate(300).nbytes]
    wait(slabs)
    assert sizes == [SLAB] * 10 + [300]
    assert len(made) == 11
    assert not slabs._ready


def test_a_driver_that_refuses_is_heard_by_who_asks(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(num_bytes: int) -> Any:
        raise MemoryError("no")

    monkeypatch.setattr(transfer_cuda, "allocate_pinned", refuse)
    slabs = PinnedSlabs(SLAB, 10 * SLAB)
    slabs.make_ahead()
    wait(slabs)
    with pytest.raises(MemoryError):
        slabs.allocate(SLAB)


def test_no_maker_outlives_the_engine(made: list[str]) -> None:
    """Also one that waits at the gate, or is told while it makes a slab."""
    gate = Precedence(most_held_s=60.0)
    slabs = PinnedSlabs(SLAB, 1000 * SLAB, gate)
    slabs.make_ahead()
    gate.work()
    for _ in range(READY_SLABS - FEW_SLABS):
        slabs.allocate(SLAB)
    makers = slabs._makers
    assert any(maker.is_alive() for maker in makers)
    slabs.close()
    assert not any(maker.is_alive() for maker in makers)
    assert len(made) <= READY_SLABS + len(makers)
    assert not slabs._ready
