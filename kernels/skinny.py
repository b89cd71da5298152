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

from agentrt.kernels.dependent import start_next, wait_previous
from agentrt.kernels.gemv import GATE_UP, STORE, launch_options
from agentrt.kernels.skinny_item import prefetch_item, skinny_item

TILE_ROWS = 64
MAX_ROWS = 64  # of the batch
MAX_PROGRAMS = 400  # of a product whose K is split: what is best on an H100
MIN_SPLIT_COLUMNS = 512
MULTIPROCESSORS = 132
LONG_COLUMNS = 4096


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
    item = tl.program_id(0)
    start_next(PDL)
    if PDL:
        prefetch_item(item, weight, N, K, SPLITS, PREFETCH, KIND)
    wait_previous(PDL)
    skinny_item(
        item,
        weight,
        scales,
        bias,
        x,
        squares,
        out,
        next_norm,
        next_scaled,
        next_squares,
        partial,
        counters,
        batch,
        eps,
        N,
        K,
        SPLITS,
        BK,
        BP,
        STAGES,
        KIND,
        NORM,
        PARTS,
        NEXT,
        SCALED,
        BIAS,
    )


@frozen
class SkinnyTiles:
    """How a weight is cut. `splits` and `columns` decide the bits: they may depend on its shape,
    never on the batch."""

    splits: int
    columns: int
    is_deep: bool  # a pipeline of many tiles
    prefetch: int = 256  # columns that are asked for in the cache before the wait

    @classmethod
    def choose(cls, num_tiles: int, num_columns: int) -> SkinnyTiles:
        """Splits where tiles are too few for the device; the numbers are those of an H100.

        Long rows are best read by one program a multiprocessor, in a deep pipeline: at batch 8 and
        32 a step (8B shape) took 5.95 and 7.29 ms, and 5.97 and 7.38 with two programs each.
        """
        is_deep = num_columns >= LONG_COLUMNS and num_tiles <= MULTIPROCESSORS
        return cls(*cls._cut(num_tiles, num_columns, is_alone=is_deep), is_deep)

    @classmethod
    def choose_narrow(cls, num_tiles: int, num_columns: int) -> SkinnyTiles:
        """The same for weights of 8 bits: as many splits as for short rows, so that one program
        computes while another waits (there is several times as much to compute for a byte), and
        deep pipelines for all, as a tile has half the bytes. On an H200 a step at batch 8 took
        0.94 ms (1B shape) and 3.9 (8B), with the pipelines of 16 bits 1.24 and 4.6, with one
        program a multiprocessor 0.95 and 4.5; products measured alone tell less."""
        return cls(*cls._cut(num_tiles, num_columns, is_alone=False), is_deep=True, prefetch=512)

    @staticmethod
    def _cut(num_tiles: int, num_columns: int, *, is_alone: bool) -> tuple[int, int]:
        """Splits and columns; `is_alone`: of one program a multiprocessor."""
        columns = min(128, max(16, triton.next_power_of_2(num_columns)))
        most, least = (MULTIPROCESSORS, columns) if is_alone else (MAX_PROGRAMS, MIN_SPLIT_COLUMNS)
        splits = 1
        while (
            num_tiles * splits * 2 <= most
            and num_columns % (splits * 2 * columns) == 0
            and num_columns // (splits * 2) >= least
        ):
            splits *= 2
        return splits, columns

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
    choose = SkinnyTiles.choose_narrow if weight.itemsize == 1 else SkinnyTiles.choose
    tiles = tiles or choose(count, num_columns)
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
