"""A decode step as one CUDA graph: static inputs on the device, a replay a step."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from agentrt.cuda_inputs import NUM_BUFFERS
from agentrt.decode_persistent import OneLaunch, capture_step, persistent_steps
from agentrt.kernels.attention_decode import FEW_ROWS, WIDE_HEADS
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.rows import fetch
from agentrt.kernels.sample import sample_rows
from agentrt.models.llama import LlamaModel
from agentrt.step_device import Captured, StepDevice

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
FIELDS = ("token_ids", "slots", "positions", "seeds", "temperatures")


Contexts = Literal["short", "long", "common"]  # of the rows of a step
Flat = TypeVar("Flat", Tensor, NDArray[np.int32])


def parts(flat: Flat, width: int) -> tuple[Flat, Flat, Flat, Flat]:
    """Views of a step's inputs (see DecodeInputs): FIELDS [5, width], the rows' first tiles
    [width + 1], what rows have in common [2], and where the tokens go [1]."""
    size = len(FIELDS) * width
    return flat[:size].reshape(len(FIELDS), width), flat[size:-3], flat[-3:-1], flat[-1:]


@define
class DecodeInputs:
    """One int32 array on the device that holds a decode step's inputs, field after field, for at
    most `width` rows; then the rows' first tiles and what rows have in common (see
    `attention_decode`), and where the step's tokens go in `outbox`, which is wide enough for every
    kind of step.

    A step itself fetches them from `ring`, and writes its tokens to `outbox`: both are page-locked
    memory of the host. Two copies between one step and the next cost 18 us more on an H100.
    Invariant: `step` is the number of steps that have run, and the ring's next buffer belongs to
    the step that will run next; at most NUM_BUFFERS - 1 steps are written and not done.
    """

    flat: Tensor
    width: int
    ring: Tensor  # [NUM_BUFFERS, len(flat)]
    outbox: Tensor  # [NUM_BUFFERS, most tokens of a step]
    step: Tensor  # [1], on the device
    _num_written: int = field(default=0, init=False)

    @classmethod
    def allocate(cls, width: int, device: torch.device, most_outputs: int) -> DecodeInputs:
        size = (len(FIELDS) + 1) * width + 4

        def locked(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")

        return cls(
            torch.zeros(size, dtype=torch.int32, device=device),
            width,
            locked(NUM_BUFFERS, size),
            locked(NUM_BUFFERS, most_outputs),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def write(self, values: NDArray[np.int32]) -> None:
        """Hand over what the next step is to fetch: all of `flat`."""
        self.ring[self._num_written % NUM_BUFFERS].numpy()[:] = values
        self._num_written += 1

    def restart(self) -> None:
        """Begin to count: steps ran that nothing was written for."""
        self.step.zero_()
        self._num_written = 0

    @property
    def outbox_at(self) -> Tensor:
        """Where in the flat outbox the step's tokens begin."""
        return parts(self.flat, self.width)[3]

    @property
    def common(self) -> Tensor:
        return parts(self.flat, self.width)[2]

    def get(self, name: str, rows: int) -> Tensor:
        values = parts(self.flat, self.width)[0][FIELDS.index(name), :rows]
        return values.view(torch.float32) if name == "temperatures" else values

    def starts(self, rows: int) -> Tensor:
        return parts(self.flat, self.width)[1][: rows + 1]


@define
class DecodeGraphs:
    """Owns a graph a bucket for short contexts, and further ones where those differ: for long
    contexts, and for long ones of which some have tiles in common. They share their memory: one
    runs at a time. Replaying one fetches the inputs, and writes `outbox` and the graph's logits
    [rows, vocab].
    """

    model: LlamaModel
    ops: CudaOps
    kv: Tensor
    scratch: Scratch
    inputs: DecodeInputs
    tables: Tensor
    last_tokens: Tensor
    device: StepDevice
    persistent: dict[int, OneLaunch] = field(factory=dict, init=False)  # by bucket
    _graphs: dict[tuple[int, Contexts], Captured] = field(factory=dict, init=False)

    @property
    def max_rows(self) -> int:
        return max((bucket for bucket, _ in self._graphs), default=0)

    def get(self, num_rows: int, contexts: Contexts) -> Captured:
        """The graph of the smallest bucket that holds `num_rows`."""
        return self._graphs[self._bucket(num_rows), contexts]

    def shares_common(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows that have tiles in common."""
        return (self._bucket(num_rows), "common") in self._graphs

    def _bucket(self, num_rows: int) -> int:
        return min(bucket for bucket, _ in self._graphs if bucket >= num_rows)

    def capture(self, max_batch: int) -> None:
        """Compile every kernel and capture all buckets that `max_batch` needs."""
        pool, largest = None, next((b for b in BUCKETS if b >= max_batch), BUCKETS[-1])
        for bucket in reversed([b for b in BUCKETS if b <= largest]):
            made = self.device.capture(partial(self.compute, bucket), pool)
            pool = made.pool
            self._graphs[bucket, "short"] = made
            if self._differs_if_long(bucket):
                made = self.device.capture(partial(self.compute, bucket, "long"), pool)
            self._graphs[bucket, "long"] = made
            if bucket > FEW_ROWS and self.ops.shares_common(self.model.geometry):
                made = self.device.capture(partial(self.compute, bucket, "common"), pool)
                self._graphs[bucket, "common"] = made
        self.inputs.restart()

    def use_persistent(self) -> None:
        """From now on a step of few rows is one launch (see `kernels.persistent`), whether their
        contexts are short or long."""
        self.persistent = persistent_steps(self, {bucket for bucket, _ in self._graphs})
        for bucket, step in self.persistent.items():
            made = capture_step(self.device, step)
            self._graphs[bucket, "short"] = self._graphs[bucket, "long"] = made
            self._graphs.pop((bucket, "common"), None)
        self.inputs.restart()

    def check(self) -> None:
        """Raise RuntimeError if a step that is done was not computed to its end."""
        if any(step.has_failed for step in self.persistent.values()):
            raise RuntimeError(
                "programs of a decode step waited for each other in vain, as if they were not all "
                "on the device: keep other work off it, or use decode_launch='graph'"
            )

    def _differs_if_long(self, bucket: int) -> bool:
        """Whether `plan_decode` gives another step: never where the sums have one order."""
        is_wide = self.model.geometry.head_dim >= WIDE_HEADS
        return is_wide and bucket > FEW_ROWS and not self.ops.deterministic

    def compute(self, bucket: int, contexts: Contexts = "short") -> Tensor:
        """The step itself: what a graph holds, and what runs without one."""
        inputs, pdl = self.inputs, self.ops.pdl
        fetch(inputs.ring, inputs.step, inputs.flat, pdl=pdl)
        rows = Rows(
            token_ids=inputs.get("token_ids", bucket),
            slots=inputs.get("slots", bucket),
            positions=inputs.get("positions", bucket),
            tables=self.tables,
            last_tokens=self.last_tokens,
        )
        step = self.ops.plan_decode(
            rows,
            inputs.starts(bucket),
            self.kv,
            self.model.geometry,
            self.scratch,
            is_long=contexts != "short",
            common=inputs.common if contexts == "common" else None,
        )
        logits = self.model.run(step)
        sample_rows(
            logits,
            inputs.get("temperatures", bucket),
            inputs.get("seeds", bucket),
            rows.slots,
            self.last_tokens,
            inputs.outbox,
            self.scratch.sample,
            place=inputs.outbox_at,
            step=inputs.step,
            pdl=pdl,
        )
        return logits
