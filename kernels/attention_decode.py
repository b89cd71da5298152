"""Paged attention of decode rows: head norm, rotary embedding, append, and split softmax in one.

A row's context is cut into tiles of `tile_tokens`, and those into units of so many consecutive
tiles that all units of a kv head each are about as many programs as the device runs at once. A
program takes one unit and kv head. It turns the queries itself, and who has a row's last unit also
turns its key and writes key and value to the cache. Where programs share a row and kv head, the
last of them to arrive adds what each has found, in ascending order (Flash-Decoding's merge).

The first tile of a program is in its registers before it waits for the kernel before (see
`dependent`): at batch 1 and 1,024 tokens it is the only one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from agentrt.kernels.attention_common import QUERY_ROWS, common_attention_kernel
from agentrt.kernels.attention_unit import attend_unit, locate
from agentrt.kernels.dependent import start_next, wait_previous
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.narrow import load_scales
from agentrt.kernels.narrow_decode import as_pairs
from agentrt.kernels.paged import load_tile
from agentrt.kernels.rotary import angles_at

FEW_ROWS = 4  # up to so many, what counts is that a program starts early, and not its bandwidth
SEVERAL_ROWS = 8
WIDE_HEADS = 128  # and narrow ones below
MAX_BATCH = 64  # with more rows another kernel is compiled


# Batches and their offsets within a step's arrays vary: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["batch", "capacity"],
    do_not_specialize_on_alignment=["slots", "positions", "starts", "scales"],
)
def decode_attention_kernel(
    qkv,  # [batch, (heads + 2 * kv_heads) * D]
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [batch, heads * D]
    tables,  # [slots, TABLE]
    slots,  # [batch]
    positions,  # [batch], of the row's own token
    starts,  # [batch + 1]: row i has the tiles starts[i] .. starts[i + 1]; without any it is idle
    cos,  # [context, D / 2]
    sin,
    query_norm,  # [D], if NORM
    key_norm,
    partial,  # [programs, GP, D] scratch, float32
    peaks,  # [programs, 2, GP]: the largest score (log2), and the sum of the weights
    counters,  # [batch, kv_heads], zero
    scales,  # [2, kv_heads], if the cache is 8 bits wide: see `narrow`
    batch,
    capacity,
    eps,
    scale,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GP: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    NARROW: tl.constexpr = key_cache.dtype.element_ty == tl.float8e4nv
    W: tl.constexpr = D // 2 if NARROW else D  # of a row that is read
    start_next(PDL)
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    # All that the host has sent is read before the wait, and the first keys and values are.
    row, part, num_units, tiles_each, position, slot, place = locate(
        program // KV_HEADS, slots, positions, starts, batch, capacity, KV_HEADS, BP
    )
    if num_units == 0:  # room for the next kernel; but one program has to wait in any case
        if program == 0:
            wait_previous(PDL)
        return
    cosines, sines = angles_at(cos, sin, position, D)
    table = tables + slot.to(tl.int64) * TABLE
    start = part * tiles_each * TILE
    end = tl.minimum(start + tiles_each * TILE, position)
    key_reads, value_reads = key_cache, value_cache
    if NARROW:
        key_reads, value_reads = as_pairs(key_cache), as_pairs(value_cache)
    keys = load_tile(key_reads, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE, True)
    values = load_tile(
        value_reads, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, W, TILE, True
    )
    own_block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
    key_scale, value_scale = eps, eps
    if NARROW:
        key_scale, value_scale = load_scales(scales, kv_head, KV_HEADS)
        scale *= key_scale
    wait_previous(PDL)
    attend_unit(
        keys,
        values,
        qkv + row.to(tl.int64) * WIDTH,
        key_cache,
        value_cache,
        out + (row.to(tl.int64) * HEADS + kv_head * G) * D,
        table,
        own_block,
        position,
        start,
        end,
        kv_head,
        part,
        num_units,
        query_norm,
        key_norm,
        cosines,
        sines,
        partial,
        peaks,
        counters + row * KV_HEADS + kv_head,
        place * KV_HEADS + kv_head,
        key_scale,
        value_scale,
        eps,
        scale,
        HEADS,
        KV_HEADS,
        D,
        BLOCK_TOKENS,
        TILE,
        STAGES,
        NORM,
        GP,
        THREADS,
    )


@frozen
class DecodeWork:
    """Scratch of decode attention, used anew by every layer."""

    num_programs: int  # at once
    partial: Tensor
    peaks: Tensor
    counters: Tensor  # zero between launches

    @classmethod
    def allocate(
        cls,
        num_programs: int,
        max_batch: int,
        num_heads: int,
        kv_heads: int,
        dim: int,
        device: torch.device,
    ) -> DecodeWork:
        """For a device that runs `num_programs` programs at once, and rows up to `max_batch`."""
        group = triton.next_power_of_2(num_heads // kv_heads)
        # A unit of common tiles leaves a share for each of its rows.
        most_units = num_programs * 3 // 2 * (1 + members(group)) + 2 * max_batch * kv_heads
        shares = most_units * group
        return cls(
            num_programs,
            torch.empty(shares * dim, dtype=torch.float32, device=device),
            torch.empty(2 * shares, dtype=torch.float32, device=device),
            torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
        )

    def for_contexts(self, dim: int, batch: int, *, is_long: bool) -> DecodeWork:
        """With half as many programs again where many rows have long contexts: 25 rows of 1,400 to
        6,000 tokens took 150 us on an H100 (dim 128), not 158; but 8 of 16,384 took 210, not 202,
        and narrow heads gain nothing."""
        if not is_long or batch <= SEVERAL_ROWS or dim < WIDE_HEADS:
            return self
        return evolve(self, num_programs=self.num_programs * 3 // 2)


@frozen
class DecodeRows:
    """Where the decode rows of a step stand: device tensors, int32."""

    slots: Tensor  # [batch], the row of `tables`
    positions: Tensor  # [batch]
    starts: Tensor  # [batch + 1], see the kernel
    tables: Tensor  # [slots, blocks of the longest context]
    # [2]: how many rows, the first ones, have how many tiles in common (see `attention_common`);
    # these are not among `starts`.
    common: Tensor | None = None


def members(group: int) -> int:
    """How many rows, of `group` query heads a kv head (padded), one unit of common tiles serves."""
    return max(1, QUERY_ROWS // group)


def tile_tokens(dim: int) -> int:
    """Tokens of a tile: what was best on an H100."""
    return 128 if dim < WIDE_HEADS else 64


def num_tiles(position: int, dim: int) -> int:
    """Tiles of a row whose own token stands at `position`: that token is in none of them."""
    return max(1, -(-position // tile_tokens(dim)))


def choose_stages(dim: int, batch: int, *, is_long: bool = False) -> int:
    """Tiles in flight: one, in registers, or more, in shared memory. The bits are the same.

    A kernel that takes more shared memory than the one before cannot start on a multiprocessor
    before that has ended there. On an H100 one row is read fastest from registers, also 16,384
    tokens (3 stages: 4 % of a step more); 8 and 32 rows of 1,024 tokens with two stages.
    """
    if batch <= FEW_ROWS:
        return 1
    return 3 if is_long and dim >= WIDE_HEADS else 2


def decode_attention(
    qkv: Tensor,
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    out: Tensor,  # [batch, heads * dim]
    rows: DecodeRows,
    work: DecodeWork,
    cos: Tensor,
    sin: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    num_stages: int,
    num_warps: int = 4,
    pdl: bool = False,
    scales: Tensor | None = None,  # [2, kv_heads], of a pool of 8 bits: see `narrow`
) -> Tensor:
    """Attention of one token a row; its key and value are appended to `kv`. `num_stages` (see
    `choose_stages`) changes the time alone, `num_warps` the bits too."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads, batch = out.shape[1] // dim, out.shape[0]
    group = triton.next_power_of_2(heads // kv_heads)
    kernel: Any = decode_attention_kernel
    own: dict[str, object] = {"scales": cos if scales is None else scales}
    num_ends = batch  # of rows: each may have a unit that is not whole
    if rows.common is not None:
        assert scales is None, "no kernel reads 8 bits for several rows"
        kernel, own = common_attention_kernel, {"common": rows.common, "MEMBERS": members(group)}
        num_ends += -(-batch // members(group))
    kernel[(work.num_programs + num_ends * kv_heads,)](
        qkv=qkv,
        key_cache=kv[0],
        value_cache=kv[1],
        out=out,
        tables=rows.tables,
        slots=rows.slots,
        positions=rows.positions,
        starts=rows.starts,
        cos=cos,
        sin=sin,
        query_norm=cos if norms is None else norms[0],
        key_norm=cos if norms is None else norms[1],
        partial=work.partial,
        peaks=work.peaks,
        counters=work.counters,
        batch=batch,
        capacity=work.num_programs,
        eps=eps,
        scale=dim**-0.5,
        BP=max(MAX_BATCH, triton.next_power_of_2(batch)),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        BLOCK_TOKENS=block_tokens,
        TABLE=rows.tables.shape[1],
        TILE=tile_tokens(dim),
        STAGES=num_stages,
        NORM=norms is not None,
        GP=group,
        THREADS=32 * num_warps,
        PDL=pdl,
        **own,
        num_warps=num_warps,
        **launch_options(pdl),
    )
    return out
