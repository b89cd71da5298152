"""A few rows (2 to 64) times a weight matrix: the products of decoding in batches.

The weight's rows are the M side of the tensor cores, 64 of them a tile; the batch is the N side,
padded to 16, 32 or 64. K is cut into a number of splits that depends on the weight's shape alone;
the last program of a tile to arrive adds the splits' sums in ascending order. So a row's bits do
not depend on how many rows are beside it.

The weights of a program are asked for in the L2 cache before it waits for the kernel before (see
`dependent`). A first tile in registers before the wait, which is best for one row, made these
products slower: the pipeline of asynchronous copies can only fill after it.

A norm is folded in as two factors: the product that makes a row also stores the row times the
next norm's weight, and the sum of squares of each tile; who reads it scales the result by the root.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attrs import field, frozen
from torch import Tensor

from agentrt.kernels.dependent import arrive, dot, prefetch, start_next, wait_previous
from agentrt.kernels.gemv import ADD, GATE_UP, STORE, launch_options

TILE_ROWS = 64
MAX_ROWS = 64  # of the batch
MAX_PROGRAMS = 400  # of a product whose K is split: what is best on an H100
MIN_SPLIT_COLUMNS = 512
MULTIPROCESSORS = 132
LONG_COLUMNS = 4096

_STORE = tl.constexpr(STORE)
_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)
_THREADS = tl.constexpr(128)


@triton.jit
def load_squares(squares, rows, alive, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """Of batch rows: the partial sums of squares [PARTS, STRIDE], padded to a power of two."""
    P2: tl.constexpr = triton.next_power_of_2(PARTS)
    parts = tl.arange(0, P2)
    return tl.load(
        squares + parts[:, None] * STRIDE + rows[None, :],
        mask=(parts[:, None] < PARTS) & alive[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["batch"])
def skinny_kernel(
    weight,  # [N, K], or [2 * N, K] with GATE_UP
    scales,  # [N], of fp8 weights
    bias,  # [N]
    x,  # [batch, K]
    squares,  # [PARTS, MAX_BATCH], of x's rows, if NORM
    out,  # [batch, N]
    next_norm,  # [N], if NEXT
    next_scaled,  # [batch, N]
    next_squares,  # [tiles, MAX_BATCH]
    partial,  # [tiles * SPLITS, R, BP] scratch
    counters,  # [tiles], zero
    batch,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    NEXT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    R: tl.constexpr = 64
    MAX_BATCH: tl.constexpr = 64
    KP: tl.constexpr = K // SPLITS
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    lanes = tl.arange(0, R)
    if KIND == _GATE_UP:  # 32 rows of the gate, then the same 32 of up
        rows = tile * (R // 2) + lanes % (R // 2)
        inside = tl.minimum(rows, N - 1) + lanes // (R // 2) * N
    else:
        rows = tile * R + lanes
        inside = tl.minimum(rows, N - 1)
    columns = tl.arange(0, BK)
    batch_rows = tl.arange(0, BP)
    alive = batch_rows < batch
    row_starts = inside.to(tl.int64) * K + split * KP
    start_next(PDL)
    if PDL:
        threads = tl.arange(0, _THREADS)
        if KIND == _GATE_UP:
            lane = threads % R
            one = tl.minimum(tile * (R // 2) + lane % (R // 2), N - 1) + lane // (R // 2) * N
        else:
            one = tl.minimum(tile * R + threads % R, N - 1)
        # No more than what the pipeline will ask for next: all programs' weights together would
        # push one another out of the cache.
        AHEAD: tl.constexpr = KP if KP < PREFETCH else PREFETCH
        nbytes: tl.constexpr = AHEAD // 2 * (weight.dtype.element_ty.primitive_bitwidth // 8)
        half = AHEAD // 2 * (threads // R)
        prefetch(
            weight + one.to(tl.int64) * K + split * KP + half,
            tl.full([_THREADS], nbytes, tl.int32),
            PDL,
        )
    wait_previous(PDL)
    # What the end needs is asked for before the loop, and looked at after it: a load that is waited
    # for takes a microsecond (1.1 to 1.7 % of a step at batch 8, H100).
    factor = tl.zeros([BP], tl.float32)
    if NORM:
        parts = load_squares(squares, batch_rows, alive, PARTS, MAX_BATCH)
    residual = tl.zeros([R, BP], tl.float32)
    if KIND == _ADD:
        kept = (tile * R + lanes < N)[:, None] & alive[None, :]
        cells = batch_rows[None, :] * N + tile * R + lanes[:, None]
        residual = tl.load(out + cells, mask=kept, other=0.0).to(tl.float32)
    pointers = weight + row_starts[:, None] + columns[None, :]
    x_pointers = x + batch_rows[None, :] * K + split * KP + columns[:, None]
    acc = tl.zeros([R, BP], tl.float32)
    for k in tl.range(0, KP, BK, num_stages=STAGES):
        if KP % BK == 0:
            weights = tl.load(pointers + k, eviction_policy="evict_first")
            values = tl.load(x_pointers + k, mask=alive[None, :], other=0.0)
        else:
            there = columns < KP - k
            weights = tl.load(pointers + k, mask=there[None, :], other=0.0)
            values = tl.load(x_pointers + k, mask=there[:, None] & alive[None, :], other=0.0)
        acc = dot(weights.to(values.dtype), values, acc)
    if NORM:
        factor = tl.rsqrt(tl.sum(parts, 0) / K + eps)
    if SPLITS > 1:
        cells = lanes[:, None] * BP + batch_rows[None, :]
        tl.store(partial + (tile * SPLITS + split) * (R * BP) + cells, acc)
        if arrive(counters + tile, SPLITS):
            acc = tl.zeros([R, BP], tl.float32)
            for other in tl.static_range(SPLITS):
                start = partial + (tile * SPLITS + other) * (R * BP)
                acc += tl.load(start + cells, cache_modifier=".cg")
            _finish(
                acc,
                factor,
                residual,
                inside,
                tile,
                scales,
                bias,
                out,
                next_norm,
                next_scaled,
                next_squares,
                batch,
                N,
                BP,
                KIND,
                NORM,
                NEXT,
                SCALED,
                BIAS,
            )
    else:
        _finish(
            acc,
            factor,
            residual,
            inside,
            tile,
            scales,
            bias,
            out,
            next_norm,
            next_scaled,
            next_squares,
            batch,
            N,
            BP,
            KIND,
            NORM,
            NEXT,
            SCALED,
            BIAS,
        )


@triton.jit
def _finish(
    acc,  # [R, BP], the sum over all of K
    factor,  # [BP], of the norm
    residual,  # [R, BP], what ADD adds to
    inside,  # [R], rows of the weight
    tile,
    scales,
    bias,
    out,
    next_norm,
    next_scaled,
    next_squares,
    batch,
    N: tl.constexpr,
    BP: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    NEXT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """What becomes of a finished tile."""
    R: tl.constexpr = 64
    MAX_BATCH: tl.constexpr = 64
    batch_rows = tl.arange(0, BP)
    alive = batch_rows < batch
    if SCALED:
        acc *= tl.load(scales + inside)[:, None]
    if NORM:
        acc *= factor[None, :]
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
    cells = batch_rows[None, :] * N + rows[:, None]
    if KIND == _ADD:
        result += residual
    tl.store(out + cells, result.to(out.dtype.element_ty), mask=kept)
    if NEXT:
        wide = tl.where(kept, result, 0.0)
        tl.store(next_squares + tile * MAX_BATCH + batch_rows, tl.sum(wide * wide, 0))
        norm = tl.load(next_norm + inside).to(tl.float32)
        made = (wide * norm[:, None]).to(next_scaled.dtype.element_ty)
        tl.store(next_scaled + cells, made, mask=kept)


@frozen
class SkinnyTiles:
    """How a weight is cut. `splits` and `columns` decide the bits: they may depend on its shape,
    never on the batch."""

    splits: int
    columns: int
    is_deep: bool  # one program a multiprocessor, with all of its shared memory
    prefetch: int = 256  # columns that are asked for in the cache before the wait

    @classmethod
    def choose(cls, num_tiles: int, num_columns: int) -> SkinnyTiles:
        """Splits where tiles are too few for the device; the numbers are those of an H100.

        Long rows are best read by one program a multiprocessor, in a deep pipeline: at batch 8 and
        32 a step (8B shape) took 5.95 and 7.29 ms, and 5.97 and 7.38 with two programs each.
        """
        columns = min(128, max(16, triton.next_power_of_2(num_columns)))
        is_deep = num_columns >= LONG_COLUMNS and num_tiles <= MULTIPROCESSORS
        most, least = (MULTIPROCESSORS, columns) if is_deep else (MAX_PROGRAMS, MIN_SPLIT_COLUMNS)
        splits = 1
        while (
            num_tiles * splits * 2 <= most
            and num_columns % (splits * 2 * columns) == 0
            and num_columns // (splits * 2) >= least
        ):
            splits *= 2
        return cls(splits, columns, is_deep)

    def num_stages(self, padded_batch: int) -> int:
        """Tiles of weights and of the batch that are on their way at once, in shared memory."""
        if self.is_deep:
            return {16: 8, 32: 6}.get(padded_batch, 4)
        return 3 if padded_batch == MAX_ROWS else 4


def num_tiles(num_rows: int, kind: int) -> int:
    """Tiles of a product with `num_rows` outputs; GATE_UP makes 32 outputs a tile."""
    return triton.cdiv(num_rows, TILE_ROWS // 2 if kind == GATE_UP else TILE_ROWS)


@frozen
class Normed:
    """Rows on their way through a norm: `values` are the rows times the norm's weight, and still
    to be divided by their root mean square, which `squares` [parts, MAX_ROWS] gives."""

    values: Tensor
    squares: Tensor
    eps: float


@frozen
class SkinnyWork:
    """Scratch of all skinny products of one step: they never run at the same time."""

    partial: Tensor = field()  # float32
    counters: Tensor = field()  # int32, zero between launches


def skinny(
    weight: Tensor,
    x: Tensor | Normed,  # [batch, K]
    out: Tensor,  # [batch, N]
    work: SkinnyWork,
    *,
    kind: int = STORE,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    following: tuple[Tensor, Normed] | None = None,
    tiles: SkinnyTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """out = x W^T (+ bias), or what `kind` says. `following` is the norm weight of what comes
    next and where the rows go that it makes."""
    values = x.values if isinstance(x, Normed) else x
    batch, num_columns = values.shape
    num_rows = out.shape[-1]
    count = num_tiles(num_rows, kind)
    tiles = tiles or SkinnyTiles.choose(count, num_columns)
    padded = max(16, triton.next_power_of_2(batch))
    if kind == GATE_UP and tiles.splits > 1 and bias is not None:
        raise ValueError("a gated product has no bias")
    skinny_kernel[(count * tiles.splits,)](
        weight,
        weight if scales is None else scales,
        weight if bias is None else bias,
        values,
        x.squares if isinstance(x, Normed) else values,
        out,
        out if following is None else following[0],
        out if following is None else following[1].values,
        out if following is None else following[1].squares,
        work.partial,
        work.counters,
        batch,
        x.eps if isinstance(x, Normed) else 0.0,
        num_rows,
        num_columns,
        tiles.splits,
        tiles.columns,
        padded,
        tiles.num_stages(padded),
        kind,
        isinstance(x, Normed),
        x.squares.shape[0] if isinstance(x, Normed) else 1,
        following is not None,
        scales is not None,
        bias is not None,
        tiles.prefetch,
        pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
