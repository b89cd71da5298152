"""The CUDA path: a step is attention over the paged pool, and a way to multiply."""

from __future__ import annotations

from typing import cast

import torch
import triton
from attrs import evolve, field, frozen
from torch import Tensor

from agentrt.errors import ConfigError
from agentrt.kernels import Geometry, Linear, Normal, Segment, StepInputs
from agentrt.kernels.attention_decode import DecodeWork, members, num_tiles
from agentrt.kernels.attention_prefill import PrefillTiles, plan_tiles
from agentrt.kernels.cuda_attention import Attention
from agentrt.kernels.cuda_products import (
    CudaLinear,
    DenseProducts,
    GemvProducts,
    OrderedProducts,
    Products,
    Rows,
    SkinnyProducts,
)
from agentrt.kernels.ordered_decode import OrderedDecodeWork
from agentrt.kernels.ordered_prefill import ordered_tiles
from agentrt.kernels.ordered_products import OrderedWork
from agentrt.kernels.sample import num_chunks
from agentrt.kernels.skinny import MAX_PROGRAMS, MAX_ROWS, TILE_ROWS, SkinnyWork

Chunk = tuple[int, int, int, int]
HEAD_DIMS = (16, 32, 64, 128, 256)
LEAST_NARROW_DIM = 32  # with 8-bit KV: half of it is the least that a product may sum over
MAX_GROUP = 16  # query heads of one kv head
MAX_SHARED_TILES = 1024  # of prefill: with more there is no need to share


@frozen
class OrderedScratch:
    """What steps need whose sums have one order."""

    products: OrderedWork
    decode: OrderedDecodeWork


@frozen
class Scratch:
    """Memory that every step uses anew. Counters in it are zero between launches."""

    skinny: SkinnyWork
    decode: DecodeWork
    prefill: Tensor  # counters
    sample: tuple[Tensor, Tensor, Tensor]
    ordered: OrderedScratch | None
    side: torch.cuda.Stream | None = field(default=None)  # see Attention

    @classmethod
    def allocate(
        cls,
        geometry: Geometry,
        *,
        vocab_size: int,
        max_batch: int,
        device: torch.device,
        deterministic: bool = False,
    ) -> Scratch:
        """Room for `max_batch` decode rows; `deterministic` as in CudaOps."""
        num_programs = 4  # of decode attention: on a GPU, what it holds at once
        if device.type == "cuda":
            num_programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count

        def counters(number: int) -> Tensor:
            return torch.zeros(number, dtype=torch.int32, device=device)

        partial = torch.empty(
            MAX_PROGRAMS * TILE_ROWS * MAX_ROWS, dtype=torch.float32, device=device
        )
        heads = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        decode = DecodeWork.allocate(num_programs, max_batch, *heads, device)
        ordered = None
        if deterministic:
            most_tokens = geometry.cos.shape[0]
            ordered = OrderedScratch(
                OrderedWork.allocate(device),
                OrderedDecodeWork.allocate(num_programs, max_batch, most_tokens, *heads, device),
            )
        chunks = num_chunks(vocab_size) * max_batch
        best = torch.empty(chunks, dtype=torch.float32, device=device)
        return cls(
            SkinnyWork(partial, counters(MAX_PROGRAMS)),
            decode,
            counters(MAX_SHARED_TILES * geometry.num_kv_heads),
            (best, counters(chunks), counters(max_batch)),
            ordered,
            torch.cuda.Stream(device) if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        )


@frozen
class CudaStep:
    """See `agentrt.kernels.Step`."""

    rows: Rows
    kv: Tensor
    geometry: Geometry
    products: Products
    attention: Attention
    scales: Tensor | None = None  # [layers, 2, kv_heads], of a pool of 8 bits
    outputs: Tensor | None = None  # the output rows; None for all
    output_products: Products | None = None  # of those alone

    def embed(self, table: Tensor, norm: Tensor) -> tuple[Tensor, Normal]:
        return self.products.embed(self.rows, table, norm)

    def linear(self, x: Normal, linear: Linear) -> Tensor:
        return self.products.linear(x, cast(CudaLinear, linear))

    def attend(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        scales = None if self.scales is None else self.scales[layer]
        return self.attention.attend(qkv, self.kv[layer], self.geometry, norms, scales)

    def attend_outputs(
        self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, hidden: Tensor
    ) -> tuple[CudaStep, Tensor, Tensor] | None:
        outputs = self.outputs
        if outputs is None:
            return self, hidden, self.attend(layer, qkv, norms)
        if not outputs.numel():
            scales = None if self.scales is None else self.scales[layer]
            self.attention.append(qkv, self.kv[layer], self.geometry, norms, scales)
            return None
        attended = self.attend(layer, qkv, norms)
        assert self.output_products is not None
        step = evolve(self, products=self.output_products, outputs=None)
        return step, hidden.index_select(0, outputs), attended.index_select(0, outputs)

    def add_norm(self, hidden: Tensor, x: Tensor, linear: Linear, norm: Tensor) -> Normal:
        return self.products.add_norm(hidden, x, cast(CudaLinear, linear), norm)

    def gate_up(self, x: Normal, linear: Linear) -> Tensor:
        return self.products.gate_up(x, cast(CudaLinear, linear))

    def logits(self, x: Normal, linear: Linear) -> Tensor:
        return self.products.logits(x, cast(CudaLinear, linear))


@frozen
class CudaOps:
    """See `agentrt.kernels.Ops`. `deterministic`: a row's bits depend on its own tokens and their
    positions alone (see `ordered_products` and `ordered_attention`); it needs a Scratch that is
    so, too. `cudnn`: see `attention_prefix`. `pdl`: see `dependent`. With `kv_scales` [layers, 2,
    kv_heads] the pool is 8 bits wide: see `narrow`."""

    device: torch.device
    fp8: bool = False
    deterministic: bool = False
    cudnn: bool = False
    pdl: bool = True
    kv_scales: Tensor | None = field(default=None, eq=False)
    name: str = field(init=False, default="triton")

    def __attrs_post_init__(self) -> None:
        assert not (self.deterministic and self.cudnn), "cuDNN sums in an order of its own"
        assert self.kv_scales is None or not self.deterministic

    def check(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        intermediate_size: int,
    ) -> None:
        """Raise ConfigError on a shape that the kernels are not made for."""
        group = num_heads // num_kv_heads
        widths = hidden_size, intermediate_size  # rows of weights are read 16 bytes at a time
        if head_dim not in HEAD_DIMS or group > MAX_GROUP or any(width % 16 for width in widths):
            raise ConfigError(
                f"the Triton kernels serve head_dim in {HEAD_DIMS}, at most {MAX_GROUP} query "
                f"heads a kv head, hidden_size and intermediate_size multiples of 16, not "
                f"{head_dim}, {group}, {hidden_size} and {intermediate_size}: use dtype='float32', "
                f"which runs on plain torch"
            )
        if self.kv_scales is not None and head_dim < LEAST_NARROW_DIM:
            raise ConfigError(
                f"kv_dtype='fp8' needs a head_dim of at least {LEAST_NARROW_DIM}, not {head_dim}: "
                "leave it at 'auto'"
            )

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> CudaLinear:
        if not self.fp8:
            return CudaLinear(weight.contiguous(), bias)
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = weight.float().abs().amax(1).clamp_min(1e-30) / largest
        rounded = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
        return CudaLinear(rounded, bias, scales)

    def pack_rotation(self, angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return angles.cos().to(like.device), angles.sin().to(like.device)

    def shares_common(self, geometry: Geometry) -> bool:
        """Whether decode rows may have tiles in common (see `attention_common`)."""
        group = triton.next_power_of_2(geometry.num_heads // geometry.num_kv_heads)
        return not self.deterministic and self.kv_scales is None and members(group) > 1

    def products(self, num_rows: int, eps: float, scratch: Scratch) -> Products:
        """How `num_rows` rows are multiplied."""
        if self.deterministic:
            assert scratch.ordered is not None
            return OrderedProducts(eps, scratch.ordered.products, self.pdl)
        if num_rows == 1:
            return GemvProducts(eps, self.pdl)
        if num_rows <= MAX_ROWS:
            return SkinnyProducts(eps, scratch.skinny, self.pdl)
        return DenseProducts(eps)

    def plan_step(self, inputs: StepInputs, geometry: Geometry) -> CudaStep:
        """A step on its own: tables and scratch are made for it, and all rows are prefill rows
        unless their segment has one row."""
        tables, slots = _tables(inputs, self.device)
        rows = Rows(
            token_ids=inputs.token_ids.int(),
            slots=slots,
            positions=inputs.positions.int(),
            tables=tables,
            last_tokens=torch.zeros(len(inputs.segments), dtype=torch.int32, device=self.device),
        )
        work = plan_work(inputs.segments, geometry.head_dim)
        scratch = Scratch.allocate(
            geometry,
            vocab_size=1,
            max_batch=max(work.num_decode, 1),
            device=self.device,
            deterministic=self.deterministic,
        )
        starts = torch.tensor(work.starts, dtype=torch.int32).to(self.device)
        shape, described = self.plan_chunks(work.chunks, geometry)
        tiles = torch.tensor(described, dtype=torch.int32).to(self.device)
        return self.plan_rows(
            rows, starts, tiles, shape, inputs.kv, geometry, scratch, inputs.output_rows
        )

    def plan_chunks(
        self, chunks: list[Chunk], geometry: Geometry
    ) -> tuple[PrefillTiles, list[Chunk]]:
        """Cut prefill chunks into the tiles of `prefill_attention`."""
        group = geometry.num_heads // geometry.num_kv_heads
        num_tokens = sum(number for _, _, number, _ in chunks)
        choose = ordered_tiles if self.deterministic else PrefillTiles.choose
        shape = choose(geometry.head_dim, num_tokens, geometry.num_kv_heads, group)
        return shape, plan_tiles(chunks, group, shape.rows)

    def plan_rows(
        self,
        rows: Rows,
        starts: Tensor,  # of the decode rows, which come first
        tiles: Tensor,
        shape: PrefillTiles,
        kv: Tensor,
        geometry: Geometry,
        scratch: Scratch,
        outputs: Tensor,
        prefix_blocks: Tensor | None = None,
        most_rows: int = 0,
        common: Tensor | None = None,
    ) -> CudaStep:
        """A step of decode rows and chunks whose tables are on the device. `prefix_blocks` are
        full blocks before the only chunk, if cuDNN is to attend to them, for `most_rows` rows;
        `common` is what decode rows have in common, see DecodeRows."""
        num_decode, dim = starts.shape[0] - 1, geometry.head_dim
        attention = Attention(
            rows=rows,
            num_decode=num_decode,
            starts=starts,
            tiles=tiles if tiles.numel() else None,
            tile_shape=shape,
            work=scratch.decode.for_contexts(dim, num_decode, is_long=True),
            pdl=False,
            is_long=True,  # what short contexts lose by it is little beside a chunk
            ordered=self._ordered_decode(scratch),
            counters=scratch.prefill if tiles.shape[0] <= MAX_SHARED_TILES else None,
            prefix_blocks=prefix_blocks,
            most_rows=most_rows,
            common=common,
            side=scratch.side,
        )
        products, of_outputs = (
            self.products(len(each), geometry.norm_eps, scratch)
            for each in (rows.token_ids, outputs)
        )
        return CudaStep(
            rows, kv, geometry, products, attention, self.kv_scales, outputs, of_outputs
        )

    def plan_decode(
        self,
        rows: Rows,
        starts: Tensor,
        kv: Tensor,
        geometry: Geometry,
        scratch: Scratch,
        *,
        is_long: bool = False,
        common: Tensor | None = None,
    ) -> CudaStep:
        """A step of decode rows alone, all on the device: what a graph is captured from. `is_long`
        makes it faster where contexts are long (see `choose_stages`, `DecodeWork.for_contexts`);
        `common`: see DecodeRows."""
        batch = rows.token_ids.shape[0]
        attention = Attention(
            rows=rows,
            num_decode=batch,
            starts=starts,
            tiles=None,
            tile_shape=None,
            work=scratch.decode.for_contexts(geometry.head_dim, batch, is_long=is_long),
            pdl=self.pdl,
            is_long=is_long,
            common=common,
            ordered=self._ordered_decode(scratch),
        )
        products = self.products(batch, geometry.norm_eps, scratch)
        return CudaStep(rows, kv, geometry, products, attention, self.kv_scales)

    def _ordered_decode(self, scratch: Scratch) -> OrderedDecodeWork | None:
        if not self.deterministic:
            return None
        assert scratch.ordered is not None
        return scratch.ordered.decode


@frozen
class WorkList:
    """How a mixed step's rows are shared out: `num_decode` rows, then chunks.

    `starts` are the decode rows' first tiles and the end; a chunk is (first row after the decode
    rows, position, number of rows, slot).
    """

    num_decode: int
    starts: tuple[int, ...]
    chunks: list[Chunk]


def plan_work(segments: tuple[Segment, ...], dim: int) -> WorkList:
    """Segments of one row first; a segment's slot is its index."""
    starts, chunks = [0], []
    for slot, segment in enumerate(segments):
        if segment.num_rows == 1:
            starts.append(starts[-1] + num_tiles(segment.start_position, dim))
        else:
            first = segment.first_row - (len(starts) - 1)
            chunks.append((first, segment.start_position, segment.num_rows, slot))
    return WorkList(len(starts) - 1, tuple(starts), chunks)


def _tables(inputs: StepInputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block tables of a step's segments [segments, blocks], and each row's segment."""
    width = triton.next_power_of_2(max(len(s.block_ids) for s in inputs.segments))
    tables = torch.zeros(len(inputs.segments), width, dtype=torch.int32)
    for table, segment in zip(tables, inputs.segments, strict=True):
        table[: len(segment.block_ids)] = torch.tensor(segment.block_ids, dtype=torch.int32)
    counts = torch.tensor([segment.num_rows for segment in inputs.segments])
    slots = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    return tables.to(device), slots.to(device)
