"""Products whose sums have one order for any number of rows: what deterministic=True multiplies by.

A weight is the M side of `wgmma`, 64 of its rows an instruction, and the rows of the batch are the
N side, of which an instruction computes each on its own. K is cut into `splits` chunks by the
weight's shape alone. Within a chunk the tensor cores add 16 columns after another to one float32
sum; the chunks' sums are then added in ascending order, by one program in its registers, or by the
last to arrive of the programs that did a chunk each. So neither the tile, nor the warps, nor who
shares the work changes a bit. Norms are kernels of their own: folded in as in `skinny`, their sums
of squares would follow the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from agentrt.kernels.dependent import arrive, dot, prefetch, start_next, wait_previous
from agentrt.kernels.exact import exact_options
from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.skinny import num_tiles
from agentrt.kernels.widen import widened

MAX_PROGRAMS = 400  # of a product whose chunks are shared out, as for `skinny` on an H100
MIN_CHUNK_COLUMNS = 512  # several times what one step of the pipeline multiplies, see `_chunk`
MOST_CELLS = 128 * 128  # of a tile whose chunks are shared out
TOKEN_TILES = 16  # neighbours that go through the weights together: their rows stay in the cache
_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)
_THREADS = tl.constexpr(128)


@triton.jit
def _weight_rows(tile, lanes, N: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr):
    """Rows of the weight that a tile's lanes multiply: with GATE_UP, half a tile of the gate, then
    the same rows of up. Those beyond the end repeat the last, and are not stored."""
    if KIND == _GATE_UP:
        rows = tile * (R // 2) + lanes % (R // 2)
        return tl.minimum(rows, N - 1) + lanes % R // (R // 2) * N
    return tl.minimum(tile * R + lanes % R, N - 1)


@triton.jit
def _chunk(
    pointers,  # [R, BK] of the weight, at the chunk's begin
    x_pointers,  # [BK, BP]
    alive,  # [BP]
    KP: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sum over one chunk of K, from zero. It is a loop: of a single product of tiles, the
    compiler would start the sum from what it is then added to."""
    columns = tl.arange(0, BK)
    acc = tl.zeros([R, BP], tl.float32)
    for k in tl.range(0, KP, BK, num_stages=STAGES):
        if KP % BK == 0:
            if BP <= 64:  # nobody else reads them
                weights = tl.load(pointers + k, eviction_policy="evict_first")
            else:
                weights = tl.load(pointers + k)
            values = tl.load(x_pointers + k, mask=alive[None, :], other=0.0)
        else:
            there = columns < KP - k
            weights = tl.load(pointers + k, mask=there[None, :], other=0.0)
            values = tl.load(x_pointers + k, mask=there[:, None] & alive[None, :], other=0.0)
        acc = dot(widened(weights, values.dtype), values, acc)
    return acc


@triton.jit
def _finish(
    acc,  # [R, BP]
    inside,  # [R], rows of the weight
    tile,
    tokens,  # [BP]
    alive,
    scales,
    bias,
    out,
    N: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """What becomes of a finished tile: each number for itself."""
    if SCALED:
        acc *= tl.load(scales + inside)[:, None]
    if BIAS:
        acc += tl.load(bias + inside).to(tl.float32)[:, None]
    if KIND == _GATE_UP:
        pairs = tl.permute(tl.reshape(acc, [2, R // 2, BP]), [1, 2, 0])
        gate, up = tl.split(pairs)
        rows = tile * (R // 2) + tl.arange(0, R // 2)
        result = gate * tl.sigmoid(gate) * up
    else:
        rows = tile * R + tl.arange(0, R)
        result = acc
    kept = (rows < N)[:, None] & alive[None, :]
    cells = tokens.to(tl.int64)[None, :] * N + rows[:, None]
    if KIND == _ADD:
        result += tl.load(out + cells, mask=kept, other=0.0)
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_tokens"])
def ordered_kernel(
    weight,  # [N, K], or [2 * N, K] with GATE_UP
    scales,  # [N] or [2 * N], of fp8 weights
    bias,  # as long
    x,  # [num_tokens, K]
    out,  # [num_tokens, N]; float32 with ADD
    partial,  # [tiles * SPLITS, R, BP] scratch, float32, if SHARED
    counters,  # [tiles], zero
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,  # whether a program does one chunk of a tile, or all
    R: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,  # columns that are asked for in the cache before the wait
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (2 * N + R - 1) // R if KIND == _GATE_UP else (N + R - 1) // R
    KP: tl.constexpr = K // SPLITS
    start_next(PDL)
    index = tl.program_id(0)
    split = 0
    if SHARED:
        split = index % SPLITS
        index = index // SPLITS
    first = index // (GROUP * TILES) * GROUP
    abreast = tl.minimum((num_tokens + BP - 1) // BP - first, GROUP)
    place = index % (GROUP * TILES)
    tile = place // abreast
    if PDL:
        threads = tl.arange(0, _THREADS)
        AHEAD: tl.constexpr = KP if KP < PREFETCH else PREFETCH
        EACH: tl.constexpr = AHEAD // (_THREADS // R)
        nbytes: tl.constexpr = EACH * (weight.dtype.element_ty.primitive_bitwidth // 8)
        one = _weight_rows(tile, threads, N, R, KIND).to(tl.int64) * K
        prefetch(
            weight + one + split * KP + EACH * (threads // R),
            tl.full([_THREADS], nbytes, tl.int32),
            PDL,
        )
    wait_previous(PDL)
    columns = tl.arange(0, BK)
    tokens = (first + place % abreast) * BP + tl.arange(0, BP)
    alive = tokens < num_tokens
    inside = _weight_rows(tile, tl.arange(0, R), N, R, KIND)
    pointers = weight + inside.to(tl.int64)[:, None] * K + split * KP + columns[None, :]
    x_pointers = x + tokens.to(tl.int64)[None, :] * K + split * KP + columns[:, None]
    acc = _chunk(pointers, x_pointers, alive, KP, R, BK, BP, STAGES)
    if SPLITS > 1:
        if SHARED:
            cells = tl.arange(0, R)[:, None] * BP + tl.arange(0, BP)[None, :]
            tl.store(partial + (index * SPLITS + split) * (R * BP) + cells, acc)
            if not arrive(counters + index, SPLITS):
                return
            acc = tl.zeros([R, BP], tl.float32)
            for other in tl.static_range(SPLITS):
                start = partial + (index * SPLITS + other) * (R * BP)
                acc += tl.load(start + cells, cache_modifier=".cg")
        else:
            for other in tl.range(1, SPLITS, 1, num_stages=1):
                at = other * KP
                acc += _chunk(pointers + at, x_pointers + at, alive, KP, R, BK, BP, STAGES)
    _finish(acc, inside, tile, tokens, alive, scales, bias, out, N, R, BP, KIND, SCALED, BIAS)


@frozen
class OrderedTiles:
    """How a product is cut. `splits` decides the bits, and follows the weight's shape alone; all
    else may follow the number of rows. (128 rows x 256 tokens spill where they gate.)"""

    splits: int
    is_shared: bool
    rows: int  # of the weight
    tokens: int
    columns: int
    num_stages: int
    num_warps: int

    @classmethod
    def choose(cls, num_rows: int, num_columns: int, num_tokens: int, kind: int) -> OrderedTiles:
        """For a weight with `num_rows` outputs and `num_tokens` rows of the batch."""
        columns = min(128, max(16, triton.next_power_of_2(num_columns)))
        splits = cls._splits(num_tiles(num_rows, kind), num_columns)
        tokens = min(128, max(16, triton.next_power_of_2(num_tokens)))
        if tokens < 128:
            tiles = cls(splits, False, 64, tokens, columns, 3 if tokens == 64 else 4, 4)
        elif num_tokens <= 128:
            tiles = cls(splits, False, 64, tokens, min(columns, 64), 3, 4)
        else:
            tiles = cls(splits, False, 128, tokens, min(columns, 64), 3, 8)
        programs = tiles.count(num_rows, num_tokens, kind) * splits
        return evolve(tiles, is_shared=splits > 1 and programs <= MAX_PROGRAMS)

    @staticmethod
    def _splits(num_tiles: int, num_columns: int) -> int:
        """Chunks where tiles of 64 rows are too few for the device."""
        splits = 1
        while (
            num_tiles * splits * 2 <= MAX_PROGRAMS
            and num_columns % (splits * 2 * 128) == 0
            and num_columns // (splits * 2) >= MIN_CHUNK_COLUMNS
        ):
            splits *= 2
        return splits

    def count(self, num_rows: int, num_tokens: int, kind: int) -> int:
        """Tiles of the product."""
        outputs = 2 * num_rows if kind == GATE_UP else num_rows
        return triton.cdiv(outputs, self.rows) * triton.cdiv(num_tokens, self.tokens)


@frozen
class OrderedWork:
    """Scratch of all products of one step: they never run at the same time."""

    partial: Tensor  # float32
    counters: Tensor  # int32, zero between launches

    @classmethod
    def allocate(cls, device: torch.device) -> OrderedWork:
        return cls(
            torch.empty(MAX_PROGRAMS * MOST_CELLS, dtype=torch.float32, device=device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        )


def ordered_product(
    weight: Tensor,
    x: Tensor,  # [tokens, K]
    out: Tensor,  # [tokens, N]
    work: OrderedWork,
    *,
    kind: int = STORE,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    tiles: OrderedTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """out = x W^T (+ bias), or what `kind` says (see `gemv`)."""
    (num_tokens, num_columns), num_rows = x.shape, out.shape[1]
    if not num_tokens:
        return out
    tiles = tiles or OrderedTiles.choose(num_rows, num_columns, num_tokens, kind)
    assert kind != ADD or out.dtype == torch.float32
    count = tiles.count(num_rows, num_tokens, kind)
    is_dependent = pdl and tiles.num_warps == 4  # as many threads as the kernel's prefetch has
    ordered_kernel[(count * (tiles.splits if tiles.is_shared else 1),)](
        weight,
        weight if scales is None else scales,
        weight if bias is None else bias,
        x,
        out,
        work.partial,
        work.counters,
        num_tokens,
        num_rows,
        num_columns,
        tiles.splits,
        tiles.is_shared,
        tiles.rows,
        tiles.columns,
        tiles.tokens,
        TOKEN_TILES,
        tiles.num_stages,
        kind,
        scales is not None,
        bias is not None,
        256,
        is_dependent,
        num_warps=tiles.num_warps,
        **exact_options(is_dependent),
    )
    return out
