"""What a persistent step works with, and its launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from attrs import field, frozen
from torch import Tensor

from agentrt.kernels import Geometry
from agentrt.kernels.attention_decode import DecodeWork, tile_tokens
from agentrt.kernels.cuda_products import CudaLinear
from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.persistent import (
    BEGIN,
    COLUMNS,
    HEAD,
    NUM_PHASES,
    QKV,
    SAMPLE,
    persistent_kernel,
)
from agentrt.kernels.persistent_products import PersistentTiles
from agentrt.kernels.sample import CHUNK, num_chunks

NUM_WARPS = 8
PROGRAMS_OF_TESTS = 4


@frozen
class PersistentGrid:
    """How many programs there are; how many numbers of a tile of weights a thread has; and how many
    tiles are on the way into the L2 cache while a program waits at a barrier.

    A multiprocessor has one program, of 255 registers a thread: with two of half as many, attention
    spilled. A tile's sums, itself and the tile after it are in registers at once.
    """

    num_programs: int
    numbers_per_thread: int
    prefetch_tiles: int = 2

    @classmethod
    def choose(cls, device: torch.device, head_dim: int) -> PersistentGrid:
        """All programs that the device holds at once. Without a GPU: as many as tests need."""
        numbers = 64 if head_dim < 128 else 32  # attention to wide heads leaves fewer registers
        if device.type != "cuda":
            return cls(PROGRAMS_OF_TESTS, numbers, prefetch_tiles=0)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, numbers)

    @property
    def most_numbers(self) -> int:
        """Of a tile."""
        return 32 * NUM_WARPS * self.numbers_per_thread


@frozen(kw_only=True)
class PersistentInputs:
    """Where a step finds what it is to compute, and where its tokens go: see
    `agentrt.decode_graph.DecodeInputs`."""

    ring: Tensor
    step: Tensor
    flat: Tensor
    token_ids: Tensor
    slots: Tensor
    positions: Tensor
    starts: Tensor
    seeds: Tensor
    temperatures: Tensor
    place: Tensor
    tables: Tensor
    last_tokens: Tensor
    outbox: Tensor


@frozen(kw_only=True)
class PersistentWeights:
    """A model's weights: the layers' by their addresses, so whoever holds this holds the model."""

    embedding: Tensor  # [vocab, hidden]
    addresses: Tensor  # [layers, len(COLUMNS)], int64
    final_norm: Tensor
    head: CudaLinear
    hidden_size: int
    intermediate_size: int
    qkv_bias: bool
    head_norms: bool


@frozen
class PersistentMemory:
    """What the phases of a step hand to each other. `barrier` and `failed` are zero between
    launches; once `failed` is not, nothing that was computed since is right."""

    hidden: Tensor
    row: Tensor
    qkv: Tensor
    attended: Tensor
    gated: Tensor
    logits: Tensor
    barrier: Tensor
    failed: Tensor  # [1], in the host's memory

    @classmethod
    def allocate(
        cls, geometry: Geometry, weights: PersistentWeights, device: torch.device
    ) -> PersistentMemory:
        def bf16(width: int) -> Tensor:
            return torch.empty(1, width, dtype=torch.bfloat16, device=device)

        def fp32(width: int) -> Tensor:
            return torch.empty(1, width, dtype=torch.float32, device=device)

        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        return cls(
            hidden=fp32(weights.hidden_size),
            row=bf16(weights.hidden_size),
            qkv=bf16((heads + 2 * kv_heads) * dim),
            attended=bf16(heads * dim),
            gated=bf16(weights.intermediate_size),
            logits=fp32(weights.embedding.shape[0]),
            barrier=torch.zeros(1, dtype=torch.int32, device=device),
            failed=torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
        )


def table_of_addresses(layers: list[dict[str, Tensor | None]], device: torch.device) -> Tensor:
    """The tensors of each layer, by the names in COLUMNS, as the kernel looks them up."""
    rows = [[_address(layer.get(name)) for name in COLUMNS] for layer in layers]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 16 == 0, "the kernel reads 16 bytes at a time"
    return tensor.data_ptr()


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv}


def product_shapes(
    weights: PersistentWeights, geometry: Geometry
) -> dict[str, tuple[int, int, int]]:
    """Rows and columns of each matrix and what becomes of its product, by the names of the
    kernels' arguments."""
    heads, dim = geometry.num_heads, geometry.head_dim
    qkv_rows = (heads + 2 * geometry.num_kv_heads) * dim
    hidden, width = weights.hidden_size, weights.intermediate_size
    return {
        "QKV": (qkv_rows, hidden, STORE),
        "OUTPUT": (hidden, heads * dim, ADD),
        "GATE": (width, hidden, GATE_UP),
        "DOWN": (hidden, width, ADD),
        "HEAD": (weights.embedding.shape[0], hidden, STORE),
    }


def product_tiles(
    weights: PersistentWeights, geometry: Geometry, grid: PersistentGrid
) -> dict[str, PersistentTiles]:
    """How each matrix is cut."""
    return {
        name: PersistentTiles.choose(*shape, grid.num_programs, grid.most_numbers)
        for name, shape in product_shapes(weights, geometry).items()
    }


def shape_constants(
    weights: PersistentWeights, geometry: Geometry, inputs: PersistentInputs, kv: Tensor
) -> dict[str, object]:
    """What a kernel has to know of the model and of the runner's memory."""
    vocab = weights.embedding.shape[0]
    group = geometry.num_heads // geometry.num_kv_heads
    return {
        "NUM_LAYERS": weights.addresses.shape[0],
        "SIZE": inputs.flat.shape[0],
        "SIZE_P": triton.next_power_of_2(inputs.flat.shape[0]),
        "BUFFERS": inputs.ring.shape[0],
        "TABLE": inputs.tables.shape[1],
        "VOCAB": vocab,
        "HIDDEN": weights.hidden_size,
        "HIDDEN_P": triton.next_power_of_2(weights.hidden_size),
        "WIDTH": weights.intermediate_size,
        "HEADS": geometry.num_heads,
        "KV_HEADS": geometry.num_kv_heads,
        "D": geometry.head_dim,
        "BLOCK_TOKENS": kv.shape[4],
        "PART": kv[0, 0].numel(),
        "TILE": tile_tokens(geometry.head_dim),
        "GP": triton.next_power_of_2(group),
        "HEAD_NORMS": weights.head_norms,
        "BIAS": weights.qkv_bias,
        "CHUNK": CHUNK,
        "CHUNKS": num_chunks(vocab),
        "CHUNKS_P": triton.next_power_of_2(num_chunks(vocab)),
    }


def constants_of(
    weights: PersistentWeights,
    geometry: Geometry,
    inputs: PersistentInputs,
    kv: Tensor,
    grid: PersistentGrid,
) -> dict[str, object]:
    """The kernel's compile-time arguments, but for the phases."""
    tiles = product_tiles(weights, geometry, grid)
    return {
        **shape_constants(weights, geometry, inputs, kv),
        "WEIGHT": _TYPES[weights.head.weight.dtype],
        "SCALED": weights.head.scales is not None,
        **{f"{name}_R": cut.rows for name, cut in tiles.items()},
        **{f"{name}_BK": cut.columns for name, cut in tiles.items()},
        "PROGRAMS": grid.num_programs,
        "THREADS": 32 * NUM_WARPS,
        "PREFETCH": grid.prefetch_tiles,
    }


def launch_phases(launch: Callable[[int, int, int, int], None], num_layers: int) -> None:
    """A step, a launch a phase: `launch` is given the phases and the layers, as first and end."""
    launch(BEGIN, QKV, 0, 0)
    for layer in range(num_layers):
        for phase in range(QKV, HEAD):
            launch(phase, phase + 1, layer, layer + 1)
    for phase in (HEAD, SAMPLE):
        launch(phase, phase + 1, 0, 0)


@frozen(kw_only=True)
class PersistentStep:
    """One decode step of one row: see `agentrt.kernels.persistent`."""

    weights: PersistentWeights
    geometry: Geometry
    inputs: PersistentInputs
    kv: Tensor  # [layers, 2, blocks, kv_heads, block_tokens, dim]
    work: DecodeWork
    sampling: tuple[Tensor, Tensor, Tensor]
    memory: PersistentMemory
    grid: PersistentGrid
    _constants: dict[str, object] = field(init=False)

    @_constants.default
    def _find_constants(self) -> dict[str, object]:
        return constants_of(self.weights, self.geometry, self.inputs, self.kv, self.grid)

    @property
    def logits(self) -> Tensor:
        """[1, vocab], the same memory each time."""
        return self.memory.logits

    def compute(self) -> Tensor:
        """The step, as the device can have it: in one launch, or in pieces. Returns the logits."""
        return self.launch() if self.kv.is_cuda else self.launch_in_pieces()

    def launch(self) -> Tensor:
        """The whole step, as one launch."""
        self._launch(0, NUM_PHASES, 0, self._num_layers, launch_cooperative_grid=True)
        return self.logits

    def launch_in_pieces(self) -> Tensor:
        """The same, a launch a phase: without a GPU nothing else works, and on one it tells a
        wrong barrier from a wrong phase."""
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
        persistent_kernel[(grid.num_programs,)](
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
            weights.final_norm,
            weights.head.weight,
            weights.head.weight if weights.head.scales is None else weights.head.scales,
            self.kv,
            self.geometry.cos,
            self.geometry.sin,
            memory.hidden,
            memory.row,
            memory.qkv,
            memory.attended,
            memory.gated,
            memory.logits,
            self.work.partial,
            self.work.peaks,
            self.work.counters,
            *self.sampling,
            memory.barrier,
            memory.failed,
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
