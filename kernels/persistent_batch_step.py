"""What a persistent step of several rows works with, and its launch."""

from __future__ import annotations

import torch
import triton
from attrs import field, frozen
from torch import Tensor

from agentrt.kernels import Geometry
from agentrt.kernels.attention_decode import DecodeWork
from agentrt.kernels.persistent import NUM_PHASES
from agentrt.kernels.persistent_batch import persistent_batch_kernel
from agentrt.kernels.persistent_batch_products import BatchTiles
from agentrt.kernels.persistent_step import (
    PROGRAMS_OF_TESTS,
    PersistentInputs,
    PersistentWeights,
    launch_phases,
    product_shapes,
    shape_constants,
)
from agentrt.kernels.skinny import MAX_ROWS, TILE_ROWS, SkinnyWork

MOST_ROWS = 8
PADDED_ROWS = 16  # the least that a product of tensor cores has
NUM_WARPS = 4  # 16 rows of a tile each
PROGRAMS_EACH = 2  # of a multiprocessor, which has room for no more of 255 registers a thread


@frozen
class BatchGrid:
    """How many programs there are; how many tiles of a product, and of keys and values, are on
    their way at once in the shared memory of each; and how many columns of weights are asked for in
    the L2 cache while a program waits."""

    num_programs: int
    num_stages: int = 4
    attention_stages: int = 3
    prefetch_columns: int = 256

    @classmethod
    def choose(cls, device: torch.device) -> BatchGrid:
        """All programs that the device holds at once. Without a GPU: as many as tests need."""
        if device.type != "cuda":
            return cls(PROGRAMS_OF_TESTS, prefetch_columns=0)
        properties = torch.cuda.get_device_properties(device)
        return cls(PROGRAMS_EACH * properties.multi_processor_count)


@frozen
class BatchMemory:
    """What the phases of a step of at most MOST_ROWS rows hand to each other. `barrier`, `failed`
    and the products' counters are zero between launches; once `failed` is not, nothing that was
    computed since is right."""

    hidden: Tensor
    scaled: Tensor
    squares: Tensor
    qkv: Tensor
    attended: Tensor
    gated: Tensor
    logits: Tensor
    products: SkinnyWork
    barrier: Tensor
    failed: Tensor  # [1], in the host's memory

    @classmethod
    def allocate(
        cls, geometry: Geometry, weights: PersistentWeights, grid: BatchGrid, device: torch.device
    ) -> BatchMemory:
        def bf16(width: int) -> Tensor:
            return torch.zeros(MOST_ROWS, width, dtype=torch.bfloat16, device=device)

        def fp32(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        def counters(number: int) -> Tensor:
            return torch.zeros(number, dtype=torch.int32, device=device)

        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        split = [cut for cut in batch_tiles(weights, geometry, grid).values() if cut.splits > 1]
        num_items = max((cut.items for cut in split), default=1)
        num_tiles = max((cut.tiles for cut in split), default=1)
        return cls(
            hidden=fp32(MOST_ROWS, weights.hidden_size),
            scaled=bf16(weights.hidden_size),
            squares=fp32(triton.cdiv(weights.hidden_size, TILE_ROWS), MAX_ROWS),
            qkv=bf16((heads + 2 * kv_heads) * dim),
            attended=bf16(heads * dim),
            gated=bf16(weights.intermediate_size),
            logits=fp32(MOST_ROWS, weights.embedding.shape[0]),
            products=SkinnyWork(fp32(num_items * TILE_ROWS * PADDED_ROWS), counters(num_tiles)),
            barrier=counters(1),
            failed=torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
        )


def batch_tiles(
    weights: PersistentWeights, geometry: Geometry, grid: BatchGrid
) -> dict[str, BatchTiles]:
    """How each matrix is cut, by the names of the kernel's arguments."""
    return {
        name: BatchTiles.choose(*shape, grid.num_programs, grid.num_stages)
        for name, shape in product_shapes(weights, geometry).items()
    }


def batch_constants(
    weights: PersistentWeights,
    geometry: Geometry,
    inputs: PersistentInputs,
    kv: Tensor,
    grid: BatchGrid,
) -> dict[str, object]:
    """The kernel's compile-time arguments, but for the phases. They are the same for any number of
    rows."""
    tiles = batch_tiles(weights, geometry, grid)
    parts = triton.cdiv(weights.hidden_size, TILE_ROWS)
    return {
        **shape_constants(weights, geometry, inputs, kv),
        "PARTS": parts,
        "PARTS_P": triton.next_power_of_2(parts),
        **{f"{name}_ITEMS": cut.items for name, cut in tiles.items()},
        **{f"{name}_SPLITS": cut.splits for name, cut in tiles.items()},
        **{f"{name}_BK": cut.columns for name, cut in tiles.items()},
        "BP": PADDED_ROWS,
        "STAGES": grid.num_stages,
        "ATTENTION_STAGES": grid.attention_stages,
        "PROGRAMS": grid.num_programs,
        "THREADS": 32 * NUM_WARPS,
        "PREFETCH": grid.prefetch_columns,
    }


@frozen(kw_only=True)
class BatchStep:
    """One decode step of `batch` rows: see `agentrt.kernels.persistent_batch`."""

    batch: int
    weights: PersistentWeights
    geometry: Geometry
    inputs: PersistentInputs
    kv: Tensor  # [layers, 2, blocks, kv_heads, block_tokens, dim]
    work: DecodeWork
    sampling: tuple[Tensor, Tensor, Tensor]
    memory: BatchMemory
    grid: BatchGrid
    _constants: dict[str, object] = field(init=False)

    @_constants.default
    def _find_constants(self) -> dict[str, object]:
        return batch_constants(self.weights, self.geometry, self.inputs, self.kv, self.grid)

    @property
    def logits(self) -> Tensor:
        """[batch, vocab], the same memory each time."""
        return self.memory.logits[: self.batch]

    def compute(self) -> Tensor:
        """The step, as the device can have it: in one launch, or in pieces. Returns the logits."""
        return self.launch() if self.kv.is_cuda else self.launch_in_pieces()

    def launch(self) -> Tensor:
        """The whole step, as one launch."""
        self._launch(0, NUM_PHASES, 0, self._num_layers, launch_cooperative_grid=True)
        return self.logits

    def launch_in_pieces(self) -> Tensor:
        """The same, a launch a phase: see `PersistentStep`."""
        launch_phases(self._launch, self._num_layers)
        return self.logits

    @property
    def has_failed(self) -> bool:
        """Whether a barrier of a step that is done did not hold."""
        return bool(self.memory.failed.item())

    @property
    def _num_layers(self) -> int:
        return int(self.weights.addresses.shape[0])

    def _launch(
        self, first: int, end: int, first_layer: int, end_layer: int, **options: bool
    ) -> None:
        weights, inputs, memory, grid = self.weights, self.inputs, self.memory, self.grid
        persistent_batch_kernel[(grid.num_programs,)](
            inputs.ring,
            inputs.step,
            inputs.flat,
            inputs.token_ids,
            inputs.slots,
            inputs.positions,
            inputs.starts,
            inputs.seeds,
            inputs.temperatures,
            inputs.place,
            inputs.tables,
            inputs.last_tokens,
            inputs.outbox,
            weights.embedding,
            weights.addresses,
            weights.head.weight,
            self.kv,
            self.geometry.cos,
            self.geometry.sin,
            memory.hidden,
            memory.scaled,
            memory.squares,
            memory.qkv,
            memory.attended,
            memory.gated,
            memory.logits,
            memory.products.partial,
            memory.products.counters,
            self.work.partial,
            self.work.peaks,
            self.work.counters,
            *self.sampling,
            memory.barrier,
            memory.failed,
            self.batch,
            first_layer,
            end_layer,
            self.geometry.norm_eps,
            self.geometry.head_dim**-0.5,
            FIRST=first,
            END=end,
            **self._constants,
            num_warps=NUM_WARPS,
            **options,
        )
