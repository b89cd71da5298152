"""One matrix of a persistent step: what `gemv` does in one launch, by programs that stay.

A program takes every PROGRAMS-th item, which is R rows of the weight whole. While a tile of weights
is multiplied the next one is on its way into registers, across the ends of items too; the first is
fetched before the barrier, and more of them into the L2 cache. Sums are those of `gemv_stage`:
each column of the tile for itself, in ascending order, then `finish_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attrs import frozen

from agentrt.kernels.dependent import prefetch_where
from agentrt.kernels.gemv import ADD, GATE_UP, finish_rows, load_vector
from agentrt.kernels.persistent_grid import again, announce, await_all

_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)
WIDEST = 2048


@triton.jit
def _fetch(
    weight,
    item,
    start,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
):
    """A tile of weights [R, BK / 2], two a number, and of GATE_UP the one of the second half (else
    the same again). Item and tile may be beyond the end.

    Bf16 numbers that live from one turn of a loop to the next are taken apart at its end, one a
    register, which waits for them (Triton 3.6). Pairs stay on their way.
    """
    ITEMS: tl.constexpr = (N + R - 1) // R
    pairs = weight.to(tl.pointer_type(tl.int32))
    rows = tl.arange(0, R)
    columns = tl.arange(0, BK // 2)
    mask = item < ITEMS
    if K % (2 * BK) != 0 and K != BK:
        mask = mask & (start // 2 + columns < K // 2)[None, :]
    if N % R == 0:
        # One address and constants beside it: with one a row, threads ran out of registers.
        first = pairs + (tl.cast(item, tl.int64) * (R * K // 2) + start // 2)
        pointers = first + (rows * (K // 2))[:, None] + columns[None, :]
    else:
        inside = tl.minimum(item * R + rows, N - 1)
        pointers = pairs + start // 2 + inside[:, None].to(tl.int64) * (K // 2) + columns[None, :]
    tile = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    if KIND == _GATE_UP:
        pointers += tl.cast(N, tl.int64) * (K // 2)
        up_tile = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        return tile, up_tile
    return tile, tile


@triton.jit
def _widened(pairs):
    """Pairs of bf16 numbers as float32, [R, BK]."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def _add_tile(
    tile,
    up_tile,
    x,
    norm,
    start,
    acc,
    up,
    squares,
    K: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
):
    """The sums with one more tile, as `gemv_stage` adds it."""
    EVEN: tl.constexpr = K % (2 * BK) == 0 or K == BK
    columns = start + tl.arange(0, BK)
    values = load_vector(x + columns, columns < K, EVEN)
    if NORM:
        squares += values * values
        values *= load_vector(norm + columns, columns < K, EVEN)
    acc += _widened(tile) * values[None, :]
    if KIND == _GATE_UP:
        up += _widened(up_tile) * values[None, :]
    return acc, up, squares


@triton.jit
def _residual(out, item, eps, N: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr):
    """What ADD adds to; asked for before the sums are there."""
    before = eps
    if KIND == _ADD:
        rows = item * R + tl.arange(0, R)
        before = tl.load(out + tl.minimum(rows, N - 1)).to(tl.float32)
    return before


@triton.jit
def _prefetch_tile(
    weight,
    item,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A tile into the L2 cache, in as many pieces as there are warps, or rows if those are more."""
    PIECES: tl.constexpr = R if R * 32 > THREADS else THREADS // 32
    IN_ROW: tl.constexpr = PIECES // R
    NUMBERS: tl.constexpr = BK // IN_ROW
    if (item + 1) * R <= N:
        thread = tl.arange(0, THREADS)
        piece = thread // (THREADS // PIECES)
        rows = item * R + piece // IN_ROW
        pointers = weight + rows.to(tl.int64) * K + column + piece % IN_ROW * NUMBERS
        num_bytes = NUMBERS * weight.dtype.element_ty.primitive_bitwidth // 8
        prefetch_where(pointers, num_bytes, thread % (THREADS // PIECES) == 0)


@triton.jit
def product_phase(
    program,
    polls,
    barrier,
    failed,
    weight,  # [N, K], or [2 * N, K] with GATE_UP
    scales,
    bias,
    norm,
    x,
    out,
    copy,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SYNC: tl.constexpr,
):
    """A barrier, and the product behind it. Returns the polls that are left. The arguments are
    those of `gemv_stage`."""
    TILES: tl.constexpr = (K + BK - 1) // BK
    ITEMS: tl.constexpr = (N + R - 1) // R
    program = again(program)
    if SYNC:
        seen = announce(barrier, program, PROGRAMS)
    tile, up_tile = _fetch(weight, program, 0, N, K, R, BK, KIND)
    if K % BK == 0 and BK >= 64 and R <= THREADS:
        for ahead in tl.static_range(1, 1 + PREFETCH):
            item = program + ahead // TILES * PROGRAMS
            _prefetch_tile(weight, item, ahead % TILES * BK, N, K, R, BK, THREADS)
            if KIND == _GATE_UP:
                up_weight = weight + tl.cast(N, tl.int64) * K
                _prefetch_tile(up_weight, item, ahead % TILES * BK, N, K, R, BK, THREADS)
    if SYNC:
        polls = await_all(barrier, seen, polls, failed)
    # Two tiles a turn: they take turns in two sets of registers, and none is copied from the one to
    # the other, which would wait for it. The second may be beyond the end. A barrier behind each
    # fetch keeps it before the sums: the assembler would put it after them, to save registers.
    if TILES == 1:
        for item in range(program, ITEMS, 2 * PROGRAMS):
            second = item + PROGRAMS
            other, other_up = _fetch(weight, second, 0, N, K, R, BK, KIND)
            tl.debug_barrier()
            before = _residual(out, item, eps, N, R, KIND)
            acc = tl.zeros([R, BK], tl.float32)
            squares = tl.zeros([BK], tl.float32)
            sums = _add_tile(tile, up_tile, x, norm, 0, acc, acc, squares, K, BK, KIND, NORM)
            finish_rows(
                item * R + tl.arange(0, R),
                *sums,
                before,
                scales,
                bias,
                out,
                copy,
                eps,
                N,
                K,
                KIND,
                NORM,
                COPY,
                SCALED,
                BIAS,
            )
            tile, up_tile = _fetch(weight, second + PROGRAMS, 0, N, K, R, BK, KIND)
            tl.debug_barrier()
            before = _residual(out, second, eps, N, R, KIND)
            sums = _add_tile(other, other_up, x, norm, 0, acc, acc, squares, K, BK, KIND, NORM)
            finish_rows(
                second * R + tl.arange(0, R),
                *sums,
                before,
                scales,
                bias,
                out,
                copy,
                eps,
                N,
                K,
                KIND,
                NORM,
                COPY,
                SCALED,
                BIAS,
            )
    else:
        for item in range(program, ITEMS, PROGRAMS):
            before = _residual(out, item, eps, N, R, KIND)
            acc = tl.zeros([R, BK], tl.float32)
            up = tl.zeros([R, BK], tl.float32)
            squares = tl.zeros([BK], tl.float32)
            for start in range(0, K, 2 * BK):
                other, other_up = _fetch(weight, item, start + BK, N, K, R, BK, KIND)
                tl.debug_barrier()
                acc, up, squares = _add_tile(
                    tile, up_tile, x, norm, start, acc, up, squares, K, BK, KIND, NORM
                )
                is_last = start + 2 * BK >= K
                following = tl.where(is_last, item + PROGRAMS, item)
                then = tl.where(is_last, 0, start + 2 * BK)
                tile, up_tile = _fetch(weight, following, then, N, K, R, BK, KIND)
                tl.debug_barrier()
                acc, up, squares = _add_tile(
                    other, other_up, x, norm, start + BK, acc, up, squares, K, BK, KIND, NORM
                )
            finish_rows(
                item * R + tl.arange(0, R),
                acc,
                up,
                squares,
                before,
                scales,
                bias,
                out,
                copy,
                eps,
                N,
                K,
                KIND,
                NORM,
                COPY,
                SCALED,
                BIAS,
            )
    return polls


@frozen
class PersistentTiles:
    """How one matrix is cut: rows of an item, and columns of a tile."""

    rows: int
    columns: int

    @classmethod
    def choose(
        cls, num_rows: int, num_columns: int, kind: int, num_programs: int, most_numbers: int
    ) -> PersistentTiles:
        """The tile with the most rows among those that leave the fewest programs idle, for items
        are handed out in rounds. It has at most `most_numbers`."""
        columns = min(WIDEST, triton.next_power_of_2(num_columns))
        whole = [c for c in (2048, 1024, 512, 256) if num_columns in (c, num_columns // c * c)]
        paired = [c for c in whole if num_columns == c or num_columns % (2 * c) == 0]
        if paired:
            columns = paired[0]
        numbers = most_numbers // (2 if kind == GATE_UP else 1)
        most_rows = max(1, min(numbers // columns, triton.next_power_of_2(num_rows)))
        choices = [1 << i for i in range(most_rows.bit_length())]

        def fullness(rows: int) -> float:
            items = -(-num_rows // rows)
            return items / (-(-items // num_programs) * num_programs)

        best = max(fullness(rows) for rows in choices)
        return cls(max(rows for rows in choices if fullness(rows) > best - 0.03), columns)
