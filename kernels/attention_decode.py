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

import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor

from agentrt.kernels.attention_shares import attend_tile, merge_shares, store_share
from agentrt.kernels.dependent import arrive, start_next, wait_previous
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.narrow import half_query, load_scales, narrowed
from agentrt.kernels.narrow_decode import as_pairs, attend_pairs
from agentrt.kernels.paged import load_tile
from agentrt.kernels.rotary import angles_at, load_heads, rotate

FEW_ROWS = 4  # up to so many, what counts is that a program starts early, and not its bandwidth
MAX_BATCH = 64  # with more rows another kernel is compiled
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(
    unit,
    slots,
    positions,
    starts,
    batch,
    capacity,
    KV_HEADS: tl.constexpr,
    BP: tl.constexpr,
):
    """Of a unit: its row, which of the row's units it is and how many these are (none if there is
    no such unit), the tiles of a unit, the row's position and slot. All that is loaded is loaded
    at once: a load that waits for another would take half a microsecond more."""
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=0, cache_modifier=".cg")
    ends = tl.load(starts + 1 + index, mask=there, other=0, cache_modifier=".cg")
    all_positions = tl.load(positions + index, mask=there, other=0, cache_modifier=".cg")
    all_slots = tl.load(slots + index, mask=there, other=0, cache_modifier=".cg")
    tiles_each = tl.maximum((tl.max(ends, 0) * KV_HEADS + capacity - 1) // capacity, 1)
    units = (ends - firsts + tiles_each - 1) // tiles_each
    until = tl.cumsum(units, 0)
    row = tl.sum((until <= unit).to(tl.int32), 0)
    here = index == row
    num_units = tl.sum(tl.where(here, units, 0), 0)
    part = unit - tl.sum(tl.where(here, until - units, 0), 0)
    position = tl.sum(tl.where(here, all_positions, 0), 0)
    slot = tl.sum(tl.where(here, all_slots, 0), 0)
    return row, part, num_units, tiles_each, position, slot


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
    M: tl.constexpr = 16 if GP < 16 else GP
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    NARROW: tl.constexpr = key_cache.dtype.element_ty == tl.float8e4nv
    W: tl.constexpr = D // 2 if NARROW else D  # of a row that is read
    start_next(PDL)
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    # All that the host has sent is read before the wait, and the first keys and values are.
    row, part, num_units, tiles_each, position, slot = _locate(
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
    if NARROW:
        key_scale, value_scale = load_scales(scales, kv_head, KV_HEADS)
        scale *= key_scale
    wait_previous(PDL)
    group = tl.arange(0, M)
    columns = tl.arange(0, D)
    tokens = tl.arange(0, TILE)
    one = tl.arange(0, 1)
    has_own = part == num_units - 1
    line = qkv + row.to(tl.int64) * WIDTH
    # All loads of what the kernel before has made at once: each takes most of a microsecond.
    query_values, query_turned = load_heads(line + (kv_head * G + group) * D, group < G, D)
    key_at = line + (HEADS + kv_head) * D + one
    own_values, own_turned = load_heads(key_at, (one == 0) & has_own, D)
    own_value = tl.load(key_at + KV_HEADS * D + columns, mask=(columns >= 0) & has_own, other=0.0)
    query = rotate(query_values, query_turned, query_norm, cosines, sines, eps, D, NORM).to(
        qkv.dtype.element_ty
    )
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if NARROW:
        query = half_query(query)
        largest, weight_sum, acc = attend_pairs(
            query,
            keys,
            values,
            key_reads,
            value_reads,
            table,
            start,
            end,
            kv_head,
            scale,
            KV_HEADS,
            BLOCK_TOKENS,
            D,
            M,
            TILE,
            STAGES,
        )
    elif STAGES == 1:
        for at in tl.range(start, end, TILE, num_stages=1):
            # The next tile comes into registers while this one is worked on.
            next_keys = load_tile(
                key_cache, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )
            next_values = load_tile(
                value_cache, table, at + TILE, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )
            largest, weight_sum, acc = attend_tile(
                query,
                keys,
                values,
                at + tokens < end,
                largest,
                weight_sum,
                acc,
                scale,
                M,
                TILE,
            )
            keys, values = next_keys, next_values
    else:
        largest, weight_sum, acc = attend_tile(
            query,
            keys,
            values,
            start + tokens < end,
            largest,
            weight_sum,
            acc,
            scale,
            M,
            TILE,
        )
        for at in tl.range(start + TILE, end, TILE, num_stages=STAGES):
            largest, weight_sum, acc = attend_tile(
                query,
                load_tile(key_cache, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
                load_tile(value_cache, table, at, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE),
                at + tokens < end,
                largest,
                weight_sum,
                acc,
                scale,
                M,
                TILE,
            )
    if has_own:
        key = rotate(own_values, own_turned, key_norm, cosines, sines, eps, D, NORM)
        value = own_value
        if NARROW:  # what later tokens will read
            key, value = narrowed(key, key_scale), narrowed(value, value_scale)
        key = key.to(key_cache.dtype.element_ty)
        value = value.to(value_cache.dtype.element_ty)
        cell = (own_block * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
        tl.store(key_cache + cell * D + one[:, None] * 0 + columns[None, :], key)
        tl.store(value_cache + cell * D + columns, value)
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (scale * _LOG2_E)
        peak = tl.maximum(largest, score)
        shrink = tl.exp2(largest - peak)
        weight = tl.exp2(score - peak)
        weight_sum = weight_sum * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
        largest = peak
    if NARROW:
        acc *= value_scale
    target = out + (row.to(tl.int64) * HEADS + kv_head * G) * D
    if num_units == 1:
        result = acc / weight_sum[:, None]
        tl.store(
            target + group[:, None] * D + columns[None, :],
            result.to(out.dtype.element_ty),
            mask=(group < G)[:, None],
        )
    else:
        store_share(partial, peaks, program, acc, largest, weight_sum, M, D, GP)
        if arrive(counters + row * KV_HEADS + kv_head, num_units):
            first = program - part * KV_HEADS
            merge_shares(target, partial, peaks, first, num_units, KV_HEADS, D, G, GP, THREADS)


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
        shares = (num_programs * 3 // 2 + max_batch * kv_heads) * group
        return cls(
            num_programs,
            torch.empty(shares * dim, dtype=torch.float32, device=device),
            torch.empty(2 * shares, dtype=torch.float32, device=device),
            torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
        )

    def for_contexts(self, dim: int, batch: int, *, is_long: bool) -> DecodeWork:
        """With half as many programs again where several rows of narrow heads have long contexts:
        8 rows of 16,384 tokens (1B shape) took 2.52 ms a step instead of 2.60 on an H100; 32 rows
        of 1,024 would take 1.68 instead of 1.61."""
        if not is_long or batch <= FEW_ROWS or dim >= 128:
            return self
        return evolve(self, num_programs=self.num_programs * 3 // 2)


@frozen
class DecodeRows:
    """Where the decode rows of a step stand: device tensors, int32."""

    slots: Tensor  # [batch], the row of `tables`
    positions: Tensor  # [batch]
    starts: Tensor  # [batch + 1], see the kernel
    tables: Tensor  # [slots, blocks of the longest context]


def tile_tokens(dim: int) -> int:
    """Tokens of a tile: what was best on an H100."""
    return 128 if dim < 128 else 64


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
    return 3 if is_long and dim >= 128 else 2


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
    group = heads // kv_heads
    decode_attention_kernel[(work.num_programs + batch * kv_heads,)](
        qkv,
        kv[0],
        kv[1],
        out,
        rows.tables,
        rows.slots,
        rows.positions,
        rows.starts,
        cos,
        sin,
        cos if norms is None else norms[0],
        cos if norms is None else norms[1],
        work.partial,
        work.peaks,
        work.counters,
        cos if scales is None else scales,
        batch,
        work.num_programs,
        eps,
        dim**-0.5,
        max(MAX_BATCH, triton.next_power_of_2(batch)),
        heads,
        kv_heads,
        dim,
        block_tokens,
        rows.tables.shape[1],
        tile_tokens(dim),
        num_stages,
        norms is not None,
        triton.next_power_of_2(group),
        32 * num_warps,
        pdl,
        num_warps=num_warps,
        **launch_options(pdl),
    )
    return out
