"""CudaCopier: KV between a GPU's pool and page-locked host memory, on a stream of its own."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define
from torch import Tensor

from agentrt.mover import Part


def allocate_pinned(num_bytes: int) -> Any:
    """Page-locked memory as a numpy view: what a slab of the host tier is on a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


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
            chunk = torch.cat([self._place(*place) for place in self._places(part, block_ids)], 3)
            torch.from_numpy(part.view).copy_(
                chunk.contiguous().view(torch.uint8).view(-1), non_blocking=True
            )

    @torch.inference_mode()
    def load(self, part: Part, source: Any, block_ids: tuple[int, ...], after: Any) -> None:
        layers, _, _, heads, _, dim = self.pool.shape
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            raw = torch.from_numpy(source).to(self.pool.device, non_blocking=True)
            chunk = raw.view(self.pool.dtype).view(layers, 2, heads, part.num_tokens, dim)
            inside = part.first - part.start
            for block, offset, num in self._places(part, block_ids):
                self._place(block, offset, num).copy_(chunk[:, :, :, inside : inside + num])
                inside += num

    def sync(self) -> None:
        self.stream.synchronize()

    def _place(self, block: int, offset: int, num: int) -> Tensor:
        return self.pool[:, :, block, :, offset : offset + num]

    def _places(self, part: Part, block_ids: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(block, first token in it, tokens) of each block that the part touches."""
        block_tokens, places, position = self.pool.shape[4], [], part.first
        while position < part.end:
            index, offset = divmod(position, block_tokens)
            num = min(block_tokens - offset, part.end - position)
            places.append((block_ids[index], offset, num))
            position += num
        return places
