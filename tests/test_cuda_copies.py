"""KV between a pool and chunks of host memory, with a driver that copies on the CPU."""

import ctypes
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from agentrt import transfer_cuda
from agentrt.mover import Part
from agentrt.transfer_cuda import DEVICE, HOST, CudaCopier

LAYERS, BLOCKS, HEADS, BLOCK_TOKENS, DIM = 3, 12, 2, 16, 8
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 2


class Stream:
    """Counts; everything is done at once."""

    cuda_stream = 7

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.num_synchronized = 0

    def wait_event(self, event: Any) -> None:
        self.events.append(event)

    def synchronize(self) -> None:
        self.num_synchronized += 1


class Driver:
    """cuMemcpy3DAsync as the driver's documentation describes it."""

    def __init__(self) -> None:
        self.kinds: set[tuple[int, int]] = set()

    def cuMemcpy3DAsync_v2(self, pointer: Any, stream: int) -> int:
        copy = pointer._obj
        assert stream == Stream.cuda_stream
        self.kinds.add((copy.source_kind, copy.target_kind))
        source = copy.source_device if copy.source_kind == DEVICE else copy.source_host
        target = copy.target_device if copy.target_kind == DEVICE else copy.target_host
        for z in range(copy.depth):
            for y in range(copy.height):
                ctypes.memmove(
                    target + (z * copy.target_height + y) * copy.target_pitch,
                    source + (z * copy.source_height + y) * copy.source_pitch,
                    copy.width_bytes,
                )
        return 0


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> CudaCopier:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    torch.manual_seed(0)
    pool = torch.randn(LAYERS, 2, BLOCKS, HEADS, BLOCK_TOKENS, DIM).bfloat16()
    return CudaCopier(pool, Stream(), Driver())  # type: ignore[arg-type]


def test_parts_come_back_as_they_were(copier: CudaCopier) -> None:
    """Chunks that begin and end inside blocks, from locked memory and from memory that is not."""
    pool, before = copier.pool, copier.pool.clone()
    blocks, other, saved, event = (7, 2, 9, 4), (0, 1, 3, 5), [], object()
    for start, end in ((0, 24), (24, 48), (48, 57)):
        view = np.zeros((end - start) * TOKEN_BYTES, dtype=np.uint8)
        part = Part(start=start, num_tokens=end - start, first=start, end=end, view=view)
        copier.save(part, blocks, event)
        saved.append(part)
    first = torch.from_numpy(saved[0].view).view(torch.bfloat16).view(LAYERS, 2, HEADS, 24, DIM)
    assert torch.equal(first[:, :, :, :16], before[:, :, 7])
    pool.zero_()
    for part in saved:
        copier.load(part, part.view if part.start else part.view.copy(), other, event)
    for index, (block, source) in enumerate(zip(other, blocks, strict=True)):
        num = min(16, 57 - 16 * index)
        assert torch.equal(pool[:, :, block, :, :num], before[:, :, source, :, :num])
    assert not pool[:, :, 5, :, 57 - 48 :].any()
    assert not pool[:, :, 2].any()
    assert copier.driver.kinds == {(DEVICE, HOST), (HOST, DEVICE), (DEVICE, DEVICE)}
    assert copier.stream.events == [event], "once for all parts"


def test_no_more_is_queued_than_others_can_wait_for(
    copier: CudaCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_cuda, "MOST_BYTES_QUEUED", 3 * BLOCK_TOKENS * TOKEN_BYTES)
    view = np.zeros(8 * BLOCK_TOKENS * TOKEN_BYTES, dtype=np.uint8)
    part = Part(start=0, num_tokens=128, first=0, end=128, view=view)
    copier.save(part, tuple(range(8)), object())
    assert copier.stream.num_synchronized == 2


def test_a_driver_that_refuses_is_heard(
    copier: CudaCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier.driver, "cuMemcpy3DAsync_v2", lambda copy, stream: 1, raising=False)
    part = Part(start=0, num_tokens=8, first=0, end=8, view=np.zeros(8 * TOKEN_BYTES, np.uint8))
    with pytest.raises(RuntimeError, match="error 1"):
        copier.save(part, (3,), object())
