"""Paged attention of decode rows: head norm, rotary embedding, append, and split softmax in one.

The contexts of all rows and kv heads are laid end to end and cut into tiles of `tile_tokens`; a
program takes an even share of the tiles, whatever rows they belong to. It turns the queries itself,
and who has a row's last tile also turns its key and writes key and value to the cache. Where
programs share a row and kv head, the last of them to arrive adds what each has found, in ascending
order (Flash-Decoding's merge).

The first tile of a program is in its registers before it waits for the kernel before (see
`dependent`): at batch 1 and 1,024 tokens it is the only one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.attention_shares import attend_tile, merge_shares, store_share
from agentrt.kernels.dependent import arrive, start_next, wait_previous
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.paged import load_tile
from agentrt.kernels.rotary import angles_at, load_heads, rotate

MAX_BATCH = 64  # with more rows another kernel is compiled
FEW_ROWS = 4  # up to so many, half the programs: the next kernel's then find room to start early
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(tile, slots, positions, starts, batch, KV_HEADS: tl.constexpr, BP: tl.constexpr):
    """Of a tile: its row, that row's first tile and number of tiles for one kv head, its position
    and slot. Beyond the last tile, those of some row. All that is loaded is loaded at once: a load
    that waits for another would take half a microsecond more."""
    index = tl.arange(0, BP)
    there = index < batch
    firsts = tl.load(starts + index, mask=there, other=2147483647)
    ends = tl.load(starts + 1 + index, mask=there, other=0)
    all_positions = tl.load(positions + index, mask=there, other=0)
    all_slots = tl.load(slots + index, mask=there, other=0)
    row = tl.maximum(tl.sum((firsts <= tile // KV_HEADS).to(tl.int32), 0) - 1, 0)
    row = tl.minimum(row, batch - 1)
    here = index == row
    first = tl.sum(tl.where(here, firsts, 0), 0)
    num_tiles = tl.maximum(tl.sum(tl.where(here, ends, 0), 0) - first, 1)
    position = tl.sum(tl.where(here, all_positions, 0), 0)
    slot = tl.sum(tl.where(here, all_slots, 0), 0)
    return row, first * KV_HEADS, num_tiles, position, slot


@triton.jit
def decode_attention_stage(
    program,
    num_programs,
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
    partial,  # [2 * programs, GP, D] scratch, float32
    peaks,  # [2 * programs, 2, GP]: the largest score (log2), and the sum of the weights
    counters,  # [batch, kv_heads], zero
    batch,
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
    PDL: tl.constexpr,
):
    G: tl.constexpr = HEADS // KV_HEADS
    M: tl.constexpr = 16 if GP < 16 else GP
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    start_next(PDL)
    # All that the host has sent is read before the wait, and the first keys and values are.
    total = tl.load(starts + batch).to(tl.int64) * KV_HEADS
    active = tl.minimum(total, num_programs)
    tile = total.to(tl.int32)
    stop = tile
    if program < active:
        tile = (program * total // active).to(tl.int32)
        stop = ((program + 1) * total // active).to(tl.int32)
    row, first, num_tiles, position, slot = _locate(
        tile, slots, positions, starts, batch, KV_HEADS, BP
    )
    cosines, sines = angles_at(cos, sin, position, D)
    table = tables + slot.to(tl.int64) * TABLE
    kv_head = tl.minimum((tile - first) // num_tiles, KV_HEADS - 1)
    start = (tile - first) % num_tiles * TILE
    end = tl.where(tile < stop, position, 0)  # of the cached tokens
    keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True)
    values = load_tile(
        value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
    )
    if (tile < stop) | (program == 0):  # programs without work leave room for the next kernel
        wait_previous(PDL)
    group = tl.arange(0, M)
    columns = tl.arange(0, D)
    tokens = tl.arange(0, TILE)
    one = tl.arange(0, 1)
    while tile < stop:
        # One row and kv head: its tiles from `tile` up to `until`, as many as this program has.
        head_first = first + kv_head * num_tiles
        until = tl.minimum(stop, head_first + num_tiles)
        has_own = until == head_first + num_tiles
        line = qkv + row.to(tl.int64) * WIDTH
        # All loads of what the kernel before has made at once: each takes most of a microsecond.
        query_values, query_turned = load_heads(line + (kv_head * G + group) * D, group < G, D)
        key_at = line + (HEADS + kv_head) * D + one
        own_values, own_turned = load_heads(key_at, (one == 0) & has_own, D)
        own_value = tl.load(
            key_at + KV_HEADS * D + columns, mask=(columns >= 0) & has_own, other=0.0
        )
        query = rotate(query_values, query_turned, query_norm, cosines, sines, eps, D, NORM).to(
            qkv.dtype.element_ty
        )
        largest, weight_sum, acc = attend_tile(
            query,
            keys,
            values,
            start + tokens < position,
            tl.full([M], float("-inf"), tl.float32),
            tl.zeros([M], tl.float32),
            tl.zeros([M, D], tl.float32),
            scale,
            M,
            TILE,
        )
        end = tl.minimum((until - head_first) * TILE, position)
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
        target = out + (row.to(tl.int64) * HEADS + kv_head * G) * D
        counter = counters + row * KV_HEADS + kv_head
        own_place = table + position // BLOCK_TOKENS
        own_cell = kv_head * BLOCK_TOKENS + position % BLOCK_TOKENS
        is_whole = has_own & (tile == head_first)
        goes_on = tile != head_first  # from the program before
        # Who has the first tile and who the last: the inverse of the even shares.
        from_program = (((head_first + 1) * active - 1) // total).to(tl.int32)
        to_program = (((head_first + num_tiles) * active - 1) // total).to(tl.int32)
        if has_own:
            key = rotate(own_values, own_turned, key_norm, cosines, sines, eps, D, NORM)
            key = key.to(key_cache.dtype.element_ty)
            value = own_value.to(value_cache.dtype.element_ty)
            cell = tl.load(own_place).to(tl.int64) * (KV_HEADS * BLOCK_TOKENS) + own_cell
            tl.store(key_cache + cell * D + one[:, None] * 0 + columns[None, :], key)
            tl.store(value_cache + cell * D + columns, value)
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (scale * _LOG2_E)
            peak = tl.maximum(largest, score)
            shrink = tl.exp2(largest - peak)
            weight = tl.exp2(score - peak)
            weight_sum = weight_sum * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            largest = peak
        if is_whole:
            result = acc / weight_sum[:, None]
            tl.store(
                target + group[:, None] * D + columns[None, :],
                result.to(out.dtype.element_ty),
                mask=(group < G)[:, None],
            )
        else:
            place = 2 * program + 1 - goes_on.to(tl.int32)
            store_share(partial, peaks, place, acc, largest, weight_sum, M, D, GP)
            if arrive(counter, to_program - from_program + 1):
                merge_shares(target, partial, peaks, from_program, to_program, D, G, GP)
        tile = until
        if tile < stop:
            row, first, num_tiles, position, slot = _locate(
                tile, slots, positions, starts, batch, KV_HEADS, BP
            )
            cosines, sines = angles_at(cos, sin, position, D)
            table = tables + slot.to(tl.int64) * TABLE
            kv_head = (tile - first) // num_tiles
            start = (tile - first) % num_tiles * TILE
            keys = load_tile(
                key_cache, table, start, position, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )
            values = load_tile(
                value_cache, table, start, position, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE, True
            )


# Batches and their offsets within a step's arrays vary: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["batch"], do_not_specialize_on_alignment=["slots", "positions", "starts"]
)
def decode_attention_kernel(
    qkv,
    key_cache,
    value_cache,
    out,
    tables,
    slots,
    positions,
    starts,
    cos,
    sin,
    query_norm,
    key_norm,
    partial,
    peaks,
    counters,
    batch,
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
    PDL: tl.constexpr,
):
    decode_attention_stage(
        tl.program_id(0),
        tl.num_programs(0),
        qkv,
        key_cache,
        value_cache,
        out,
        tables,
        slots,
        positions,
        starts,
        cos,
        sin,
        query_norm,
        key_norm,
        partial,
        peaks,
        counters,
        batch,
        eps,
        scale,
        BP,
        HEADS,
        KV_HEADS,
        D,
        BLOCK_TOKENS,
        TABLE,
        TILE,
        STAGES,
        NORM,
        GP,
        PDL,
    )


@frozen
class DecodeWork:
    """Scratch of decode attention, used anew by every layer."""

    num_programs: int  # at most
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
        """For launches of `num_programs` programs, and rows up to `max_batch`."""
        shares = 2 * num_programs * triton.next_power_of_2(num_heads // kv_heads)
        return cls(
            num_programs,
            torch.empty(shares * dim, dtype=torch.float32, device=device),
            torch.empty(2 * shares, dtype=torch.float32, device=device),
            torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
        )


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
    """Tiles of a row whose own token stands at `position`."""
    return position // tile_tokens(dim) + 1


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
    num_stages: int = 3,
    num_warps: int = 4,
    pdl: bool = False,
) -> Tensor:
    """Attention of one token a row; its key and value are appended to `kv`."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads, batch = out.shape[1] // dim, out.shape[0]
    group = heads // kv_heads
    num_programs = work.num_programs // 2 if batch <= FEW_ROWS else work.num_programs
    decode_attention_kernel[(max(num_programs, 1),)](
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
        batch,
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
        pdl,
        num_warps=num_warps,
        **launch_options(pdl),
    )
    return out
