"""A mixed step (decode rows and prefill chunks) as one CUDA graph.

Launched kernel by kernel, such a step took 8 ms of a CPU for 16 layers, whatever the device needed.
A graph has a fixed number of rows: first MAX_DECODE for decode rows, or none, then some for the
chunks. Idle rows have position -1 and write nothing; idle attention tiles have no rows.

The smallest graphs (SMALL_ROWS) are for steps that check drafts. There each request's rows are a
chunk, and every row may give a token: its products read the weights once, as those of one row do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from attrs import define, field, frozen
from numpy.typing import NDArray
from torch import Tensor

from agentrt.cuda_inputs import ALIGNED
from agentrt.kernels.attention_prefill import PrefillTiles
from agentrt.kernels.cuda import Chunk, CudaOps, Scratch
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.sample import sample_rows
from agentrt.models.llama import LlamaModel
from agentrt.step_device import StepDevice
from agentrt.step_rows import MixedWork

MAX_DECODE = 64
MAX_OUTPUTS = 64
# In steps that check no drafts there is room for so many chunks, or for as many of so many rows.
MIN_CHUNKS = 16
MIN_CHUNK_ROWS = 16
# Rows of a step with drafts up to which its products read the weights once: decode rows and drafts.
MOST_CHECKED_ROWS = 64
SMALL_ROWS = (16, 32)  # of chunks, without decode rows
# Of a graph in all. An H100 takes 192 us for the products of a layer (8B shape) of 192 rows, 237
# for 320, 314 for 512, 401 for 576 and 603 for 1,024.
TOTAL_ROWS = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048)

Array = NDArray[np.int32]


@frozen(kw_only=True)
class Layout:
    """Where each input of a bucket lies in one flat int32 array."""

    num_decode: int  # rows for decoding
    num_rows: int  # for chunks
    shape: PrefillTiles
    num_tiles: int
    num_outputs: int
    num_chunks: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, num_decode: int, num_rows: int, ops: CudaOps, model: LlamaModel) -> Layout:
        geometry = model.geometry
        shape, tiles = ops.plan_chunks([(0, 0, num_rows, 0)], geometry)
        rows = num_decode + num_rows
        num_outputs = min(rows, MAX_OUTPUTS)
        checks = not num_decode and num_rows <= MOST_CHECKED_ROWS
        num_chunks = num_rows if checks else max(MIN_CHUNKS, num_rows // MIN_CHUNK_ROWS)
        num_chunks = min(num_chunks, num_outputs)
        # Every further chunk may add a tile; none is without a row. Programs of those that are not
        # needed end at once, but thousands of them take a layer microseconds.
        num_tiles = min(len(tiles) + num_chunks, num_rows)
        sizes = (rows, rows, rows, num_decode + 1, 4 * num_tiles, *[num_outputs] * 4, 1, 2)
        return cls(
            num_decode=num_decode,
            num_rows=num_rows,
            shape=shape,
            num_tiles=num_tiles,
            num_outputs=num_outputs,
            num_chunks=num_chunks,
            sizes=sizes,
        )

    def holds(self, work: MixedWork) -> bool:
        """Whether there is room for all of it."""
        return (
            len(work.decode[0]) <= self.num_decode
            and len(work.prefill[0]) <= self.num_rows
            and len(work.outputs[0]) <= self.num_outputs
            and len(work.chunks) <= self.num_chunks
        )

    @property
    def offsets(self) -> list[int]:
        padded = [-(-size // ALIGNED) * ALIGNED for size in self.sizes]
        return [sum(padded[:i]) for i in range(len(padded) + 1)]

    def fill(
        self, work: MixedWork, tiles: list[Chunk], idle_slot: int, outbox_at: int = 0
    ) -> Array:
        """The flat array of a step; rows of `tiles` and outputs count the idle decode rows."""
        offsets = self.offsets
        flat = np.zeros(offsets[-1], dtype=np.int32)
        parts = [flat[start : start + n] for start, n in zip(offsets, self.sizes, strict=False)]
        parts[1][:], parts[2][:], parts[6][:] = idle_slot, -1, idle_slot
        for part, decode, prefill in zip(parts, work.decode, work.prefill, strict=False):
            part[: len(decode)] = decode
            part[self.num_decode : self.num_decode + len(prefill)] = prefill
        parts[3][:] = work.starts[-1]
        parts[3][: len(work.starts)] = work.starts
        parts[4][: 4 * len(tiles)] = np.array(tiles, dtype=np.int32).reshape(-1)
        for part, values in zip(parts[5:9], work.outputs, strict=True):
            part[: len(values)] = values
        parts[9][0] = outbox_at
        parts[10][:] = work.common
        num_decode = len(work.decode[0])
        rows = parts[5][: len(work.outputs[0])]
        rows[rows >= num_decode] += self.num_decode - num_decode
        return flat


def buckets(step_tokens: int) -> list[tuple[int, int]]:
    """Decode rows and chunk rows of the graphs for steps of so many tokens, none decoding first."""
    found = [(0, num) for num in SMALL_ROWS]
    for num_decode in (0, MAX_DECODE):
        sizes = {total - num_decode for total in TOTAL_ROWS if total > num_decode}
        largest = max(step_tokens, TOTAL_ROWS[0])
        fitting = {size for size in sizes if size < largest} | {largest}
        found += [(num_decode, size) for size in sorted(fitting)]
    return found


@frozen
class MixedGraph:
    layout: Layout
    flat: Tensor
    replay: Callable[[], None]
    logits: Tensor  # [outputs, vocab]


@define
class MixedGraphs:
    """Owns a graph a bucket. They share their memory with one another: one runs at a time."""

    model: LlamaModel
    ops: CudaOps
    kv: Tensor
    scratch: Scratch
    tables: Tensor
    last_tokens: Tensor
    outbox: Tensor  # where the tokens go, in the host's memory
    idle_slot: int
    device: StepDevice
    _graphs: list[MixedGraph] = field(
        factory=list, init=False
    )  # by ascending rows, no decode first

    def get(self, work: MixedWork) -> MixedGraph | None:
        """The smallest graph that holds the work, if one does."""
        return next((graph for graph in self._graphs if graph.layout.holds(work)), None)

    def capture(self, step_tokens: int) -> None:
        """Compile every kernel and capture all buckets up to `step_tokens` rows."""
        pool = None
        for num_decode, num_rows in reversed(buckets(step_tokens)):
            layout = Layout.of(num_decode, num_rows, self.ops, self.model)
            flat = torch.zeros(layout.offsets[-1], dtype=torch.int32, device=self.kv.device)
            flat.copy_(torch.from_numpy(layout.fill(MixedWork.nothing(), [], self.idle_slot)))
            made = self.device.capture(partial(self.compute, layout, flat), pool)
            pool = made.pool
            self._graphs.insert(0, MixedGraph(layout, flat, made.replay, made.logits))

    def compute(self, layout: Layout, flat: Tensor) -> Tensor:
        """The step itself: logits of the outputs, and their tokens into `outbox`."""
        (
            token_ids,
            slots,
            positions,
            starts,
            tiles,
            outputs,
            out_slots,
            seeds,
            temperatures,
            place,
            common,
        ) = (
            flat[start : start + size]
            for start, size in zip(layout.offsets, layout.sizes, strict=False)
        )
        rows = Rows(
            token_ids=token_ids,
            slots=slots,
            positions=positions,
            tables=self.tables,
            last_tokens=self.last_tokens,
        )
        step = self.ops.plan_rows(
            rows,
            starts,
            tiles.view(-1, 4),
            layout.shape,
            self.kv,
            self.model.geometry,
            self.scratch,
            outputs,
            common=common if self.ops.shares_common(self.model.geometry) else None,
        )
        logits = self.model.run(step)
        sample_rows(
            logits,
            temperatures.view(torch.float32),
            seeds,
            out_slots,
            self.last_tokens,
            self.outbox,
            self.scratch.sample,
            place=place,
        )
        return logits
