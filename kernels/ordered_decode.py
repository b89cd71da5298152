"""Decode attention in one order (see `ordered_attention`): whoever shares a row's context.

As in `attention_decode`, the splits are cut into units of so many that there are about as many
programs as the device runs at once. A program with a row's whole context merges its splits itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.attention_decode import MAX_BATCH, DecodeRows
from agentrt.kernels.dependent import arrive, start_next, wait_previous
from agentrt.kernels.exact import exact_options
from agentrt.kernels.ordered_attention import SPLIT, attend, merge, tile_of

ROWS = 64  # of a program's M side: what wgmma needs


@triton.jit
def _locate_splits(
    unit,
    slots,
    positions,
    starts,
    batch,
    capacity,
    KV_HEADS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BP: tl.constexpr,
):
    """Of a unit, which is some consecutive splits: its row, which of the row's units it is, how
    many these are (none if there is no such unit), the splits of a unit, those of shared rows
    before, the row's position and slot."""
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=0)
    ends = tl.load(starts + 1 + index, mask=there, other=0)
    all_positions = tl.load(positions + index, mask=there, other=0)
    all_slots = tl.load(slots + index, mask=there, other=0)
    splits = tl.where(ends > firsts, all_positions // SPLIT_TOKENS + 1, 0)
    each = tl.maximum((tl.sum(splits, 0) * KV_HEADS + capacity - 1) // capacity, 1)
    units = (splits + each - 1) // each
    until = tl.cumsum(units, 0)
    row = tl.sum((until <= unit).to(tl.int32), 0)
    here = index == row
    num_units = tl.sum(tl.where(here, units, 0), 0)
    part = unit - tl.sum(tl.where(here, until - units, 0), 0)
    before = tl.sum(tl.where((index < row) & (units > 1), splits, 0), 0)
    position = tl.sum(tl.where(here, all_positions, 0), 0)
    slot = tl.sum(tl.where(here, all_slots, 0), 0)
    return row, part, num_units, each, before, position, slot


@triton.jit(
    do_not_specialize=["batch", "capacity"],
    do_not_specialize_on_alignment=["slots", "positions", "starts"],
)
def ordered_decode_kernel(
    qkv,  # [batch, (heads + 2 * kv_heads) * D], queries turned
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    out,  # [batch, heads * D]
    tables,  # [slots, TABLE]
    slots,  # [batch]
    positions,  # [batch]
    starts,  # [batch + 1]: a row that ends where it starts is idle
    partial,  # [shares, GP, D] scratch, float32: a share is a split of a row and kv head
    peaks,  # [shares, 2, GP]: the largest score (log2), and the sum of the weights
    counters,  # [batch, kv_heads], zero
    batch,
    capacity,
    scale,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    GP: tl.constexpr,
    PDL: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    start_next(PDL)
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    row, part, num_units, each, before, position, slot = _locate_splits(
        program // KV_HEADS, slots, positions, starts, batch, capacity, KV_HEADS, SPLIT_TOKENS, BP
    )
    if num_units == 0:  # room for the next kernel; but one program has to wait in any case
        if program == 0:
            wait_previous(PDL)
        return
    table = tables + slot.to(tl.int64) * TABLE
    wait_previous(PDL)
    group = tl.arange(0, M)
    columns = tl.arange(0, D)
    heads = kv_head * G + group
    query = tl.load(
        qkv + row.to(tl.int64) * WIDTH + heads[:, None] * D + columns[None, :],
        mask=(group < G)[:, None],
        other=0.0,
    )
    begin = part * each * SPLIT_TOKENS
    end = tl.minimum(begin + each * SPLIT_TOKENS, position + 1)
    first_share = before * KV_HEADS + kv_head
    _, weight_sum, acc = attend(
        query,
        key_cache,
        value_cache,
        table,
        begin,
        end,
        tl.zeros([M], tl.int32) + position,
        end,
        kv_head,
        scale,
        num_units == 1,
        partial,
        peaks,
        first_share,
        True,
        KV_HEADS,
        D,
        BLOCK_TOKENS,
        TILE,
        SPLIT_TOKENS,
        STAGES,
        M,
        GP,
    )
    target = out + (row.to(tl.int64) * HEADS + kv_head * G) * D
    if num_units == 1:
        tl.store(
            target + group[:, None] * D + columns[None, :],
            (acc / weight_sum[:, None]).to(out.dtype.element_ty),
            mask=(group < G)[:, None],
        )
    elif arrive(counters + row * KV_HEADS + kv_head, num_units):
        num_splits = position // SPLIT_TOKENS + 1
        _merge_all(target, partial, peaks, first_share, num_splits, KV_HEADS, D, G, GP)


@triton.jit
def _load_share(
    partial, peaks, first, index, number, STEP: tl.constexpr, D: tl.constexpr, GP: tl.constexpr
):
    """A share, or one that leaves all as it is."""
    group = tl.arange(0, GP)
    place = (first + index * STEP).to(tl.int64)
    there = index < number
    cells = (place * GP + group[:, None]) * D + tl.arange(0, D)[None, :]
    largest = tl.load(
        peaks + place * (2 * GP) + group, mask=there, other=float("-inf"), cache_modifier=".cg"
    )
    weight_sum = tl.load(
        peaks + place * (2 * GP) + GP + group, mask=there, other=0.0, cache_modifier=".cg"
    )
    acc = tl.load(partial + cells, mask=there, other=0.0, cache_modifier=".cg")
    return largest, weight_sum, acc


@triton.jit
def _merge_all(
    out,
    partial,
    peaks,
    first,
    number,
    STEP: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
):
    """Merge all shares of a row, four of them loaded at once."""
    largest = tl.full([GP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    for at in tl.range(0, number, 4, num_stages=1):
        peak0, sum0, acc0 = _load_share(partial, peaks, first, at, number, STEP, D, GP)
        peak1, sum1, acc1 = _load_share(partial, peaks, first, at + 1, number, STEP, D, GP)
        peak2, sum2, acc2 = _load_share(partial, peaks, first, at + 2, number, STEP, D, GP)
        peak3, sum3, acc3 = _load_share(partial, peaks, first, at + 3, number, STEP, D, GP)
        largest, weight_sum, acc = merge(largest, weight_sum, acc, peak0, sum0, acc0)
        largest, weight_sum, acc = merge(largest, weight_sum, acc, peak1, sum1, acc1)
        largest, weight_sum, acc = merge(largest, weight_sum, acc, peak2, sum2, acc2)
        largest, weight_sum, acc = merge(largest, weight_sum, acc, peak3, sum3, acc3)
    group = tl.arange(0, GP)
    tl.store(
        out + group[:, None] * D + tl.arange(0, D)[None, :],
        (acc / weight_sum[:, None]).to(out.dtype.element_ty),
        mask=(group < G)[:, None],
    )


@frozen
class OrderedDecodeWork:
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
        max_tokens: int,
        num_heads: int,
        kv_heads: int,
        dim: int,
        device: torch.device,
    ) -> OrderedDecodeWork:
        """For contexts of up to `max_tokens`. A row is shared only if it has more than its part of
        the programs' splits: so all shared rows together have less than every program a row's."""
        sharers = min(max_batch * kv_heads, num_programs)
        shares = sharers * triton.cdiv(max_tokens, SPLIT)
        padded = shares * triton.next_power_of_2(num_heads // kv_heads)
        return cls(
            num_programs,
            torch.empty(padded * dim, dtype=torch.float32, device=device),
            torch.empty(2 * padded, dtype=torch.float32, device=device),
            torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
        )


def ordered_decode(
    qkv: Tensor,
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    out: Tensor,  # [batch, heads * dim]
    rows: DecodeRows,
    work: OrderedDecodeWork,
    *,
    num_stages: int = 2,
    pdl: bool = False,
) -> Tensor:
    """Attention of one token a row, whose keys are in the cache already."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads, batch = out.shape[1] // dim, out.shape[0]
    ordered_decode_kernel[(work.num_programs + batch * kv_heads,)](
        qkv,
        kv[0],
        kv[1],
        out,
        rows.tables,
        rows.slots,
        rows.positions,
        rows.starts,
        work.partial,
        work.peaks,
        work.counters,
        batch,
        work.num_programs,
        dim**-0.5,
        max(MAX_BATCH, triton.next_power_of_2(batch)),
        heads,
        kv_heads,
        dim,
        block_tokens,
        rows.tables.shape[1],
        tile_of(dim),
        SPLIT,
        num_stages,
        ROWS,
        triton.next_power_of_2(heads // kv_heads),
        pdl,
        num_warps=4,
        **exact_options(pdl),
    )
    return out
