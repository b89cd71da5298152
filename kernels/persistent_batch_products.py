"""One matrix of a persistent step of several rows: what `skinny` does, by programs that stay.

A program takes every PROGRAMS-th item, a tile's part of K, and does with it what a program of
`skinny` does: bits are the same where K is split alike. The weights that it begins with are asked
for in the L2 cache before it waits at the barrier, and those of its next item before each item.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attrs import frozen

from agentrt.kernels.persistent_grid import announce, await_all
from agentrt.kernels.skinny import num_tiles
from agentrt.kernels.skinny_item import prefetch_item, skinny_item

MAX_SPLITS = 16


@triton.jit
def _prefetch_there(
    item,
    weight,
    ITEMS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    """The first weights of an item, which may be beyond the end."""
    if item < ITEMS:
        prefetch_item(item, weight, N, K, SPLITS, COLUMNS, KIND)


@triton.jit(noinline=True)
def batch_product_phase(
    program,
    polls,
    barrier,
    failed,
    weight,  # [N, K], or [2 * N, K] with GATE_UP
    bias,
    x,  # [batch, K], and what follows: as in `skinny_kernel`
    out,
    next_norm,
    next_scaled,
    squares,  # of x, or with NEXT of what is made
    partial,
    counters,
    batch,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ITEMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    NEXT: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SYNC: tl.constexpr,
):
    """A barrier, and the product behind it. Returns the polls that are left."""
    # What is fetched begins at multiples of 16 bytes, and is that long.
    AHEAD: tl.constexpr = SYNC and PREFETCH > 0 and K % (16 * SPLITS) == 0
    if SYNC:
        seen = announce(barrier, program, PROGRAMS)
    if AHEAD:
        _prefetch_there(program, weight, ITEMS, N, K, SPLITS, PREFETCH, KIND)
    if SYNC:
        polls = await_all(barrier, seen, polls, failed)
    for item in tl.range(program, ITEMS, PROGRAMS, num_stages=1):
        if AHEAD:
            _prefetch_there(item + PROGRAMS, weight, ITEMS, N, K, SPLITS, PREFETCH, KIND)
        skinny_item(
            item,
            weight,
            weight,
            bias,
            x,
            squares,
            out,
            next_norm,
            next_scaled,
            squares,
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
            False,
            BIAS,
        )
    return polls


@frozen
class BatchTiles:
    """How one matrix is cut: into tiles of 64 rows, and their K into splits."""

    tiles: int
    splits: int
    columns: int  # of a step of the pipeline

    @property
    def items(self) -> int:
        return self.tiles * self.splits

    @classmethod
    def choose(
        cls, num_rows: int, num_columns: int, kind: int, num_programs: int, num_stages: int
    ) -> BatchTiles:
        """The splits that take the least time, counted in steps of the pipeline: an item has its
        own, and as many as the pipeline is deep until it runs; four partial sums are one more."""
        columns = min(128, max(16, triton.next_power_of_2(num_columns)))
        tiles, splits = num_tiles(num_rows, kind), [1]
        while splits[-1] < MAX_SPLITS and num_columns % (2 * splits[-1] * columns) == 0:
            splits.append(2 * splits[-1])

        def steps(number: int) -> float:
            rounds = -(-tiles * number // num_programs)
            own = -(-num_columns // (number * columns)) + num_stages
            return rounds * own + (number / 4 if number > 1 else 0)

        return cls(tiles, min(splits, key=steps), columns)
