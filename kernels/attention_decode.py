"""Paged attention of decode rows: head norm, rotary embedding, append, and split softmax in one.

A row's context is cut into splits of SPLIT_TOKENS tokens at absolute positions. A program works
through (row, split, kv head) items; it turns the queries itself, and who has the row's last split
also turns its key and writes key and value to the cache. The last split of a row and kv head to
arrive adds all of them in a fixed order (Flash-Decoding's merge), so that a row's bits depend on
its own context alone: not on the batch, nor on the number of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.dependent import arrive, dot, prefetch, start_next, wait_previous
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.rotary import rotated

SPLIT_TOKENS = 256
MAX_BATCH = 64  # with more rows another kernel is compiled
_LOG2_E = tl.constexpr(1.4426950408889634)
_THREADS = tl.constexpr(128)


@triton.jit
def _keys(
    cache, table, tokens, there, kv_head, KV_HEADS, BLOCK_TOKENS: tl.constexpr, D: tl.constexpr
):
    """Keys or values [tokens, D] of a paged context; hidden ones are zero."""
    block = tl.load(table + tokens // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
    cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + tokens % BLOCK_TOKENS
    offsets = cells[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(cache + offsets, mask=there[:, None], other=0.0)


@triton.jit
def _find(unit, starts, batch, BP: tl.constexpr):
    """The row of a split, and the row's first split: starts [batch + 1] ascends."""
    index = tl.arange(0, BP)
    first = tl.load(starts + index, mask=index < batch, other=2147483647)
    row = tl.sum((first <= unit).to(tl.int32), 0) - 1
    return row, tl.load(starts + row)


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
    starts,  # [batch + 1]: row i has the splits starts[i] .. starts[i + 1]; a row without any is idle
    cos,  # [context, D / 2]
    sin,
    query_norm,  # [D], if NORM
    key_norm,
    partial,  # [splits, kv_heads, GP, D] scratch, float32
    peaks,  # [splits, kv_heads, 2, GP]: the largest score (log2), and the sum of the weights
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
    SPLIT: tl.constexpr,
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
    total = tl.load(starts + batch) * KV_HEADS
    if PDL and program < total:
        # keys and values of earlier steps: a quarter of each block's a thread
        row, first = _find(program // KV_HEADS, starts, batch, BP)
        begin = (program // KV_HEADS - first) * SPLIT
        lane = tl.arange(0, _THREADS)
        PIECES: tl.constexpr = _THREADS * BLOCK_TOKENS // (2 * SPLIT)  # of a block's keys
        token = begin + lane // (2 * PIECES) * BLOCK_TOKENS
        token = tl.minimum(token, tl.load(positions + row))
        table = tables + tl.load(slots + row).to(tl.int64) * TABLE
        block = tl.load(table + token // BLOCK_TOKENS).to(tl.int64)
        cell = (block * KV_HEADS + program % KV_HEADS) * (BLOCK_TOKENS * D)
        piece = cell + lane // 2 % PIECES * (BLOCK_TOKENS * D // PIECES)
        nbytes: tl.constexpr = (
            BLOCK_TOKENS * D // PIECES * (key_cache.dtype.element_ty.primitive_bitwidth // 8)
        )
        source = tl.where(lane % 2 == 0, key_cache + piece, value_cache + piece)
        prefetch(source, tl.full([_THREADS], nbytes, tl.int32), PDL)
    wait_previous(PDL)
    for item in range(program, total, num_programs):
        unit = item // KV_HEADS
        kv_head = item % KV_HEADS
        row, first = _find(unit, starts, batch, BP)
        num_splits = tl.load(starts + row + 1) - first
        position = tl.load(positions + row)
        table = tables + tl.load(slots + row).to(tl.int64) * TABLE
        begin = (unit - first) * SPLIT
        end = tl.minimum(begin + SPLIT, position)  # of the cached tokens
        group = tl.arange(0, M)
        columns = tl.arange(0, D)
        line = qkv + row.to(tl.int64) * WIDTH
        angle = position * (D // 2) + group * 0
        query = rotated(
            line + (kv_head * G + group) * D,
            group < G,
            query_norm,
            cos + angle,
            sin + angle,
            eps,
            D,
            NORM,
        ).to(qkv.dtype.element_ty)
        largest = tl.full([M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        if begin + SPLIT > position:  # this split has the row's own token
            one = tl.arange(0, 1)
            own = position * (D // 2) + one * 0
            key_at = line + (HEADS + kv_head) * D + one * 0
            key = rotated(key_at, one == 0, key_norm, cos + own, sin + own, eps, D, NORM).to(
                key_cache.dtype.element_ty
            )
            value = tl.load(line + (HEADS + KV_HEADS + kv_head) * D + columns)
            value = value.to(value_cache.dtype.element_ty)
            block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
            cell = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
            tl.store(key_cache + cell * D + one[:, None] * 0 + columns[None, :], key)
            tl.store(value_cache + cell * D + columns, value)
            products = query.to(tl.float32) * key.to(tl.float32)
            largest = tl.sum(products, 1) * (scale * _LOG2_E)
            weight_sum += 1.0
            acc += value.to(tl.float32)[None, :]
        tokens = tl.arange(0, TILE)
        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            there = start + tokens < end
            keys = _keys(
                key_cache, table, start + tokens, there, kv_head, KV_HEADS, BLOCK_TOKENS, D
            )
            scores = dot(query, tl.trans(keys.to(query.dtype)), tl.zeros([M, TILE], tl.float32))
            scores = tl.where(there[None, :], scores * (scale * _LOG2_E), float("-inf"))
            peak = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - peak[:, None])
            shrink = tl.exp2(largest - peak)
            weight_sum = weight_sum * shrink + tl.sum(weights, 1)
            values = _keys(
                value_cache, table, start + tokens, there, kv_head, KV_HEADS, BLOCK_TOKENS, D
            )
            acc = dot(weights.to(query.dtype), values.to(query.dtype), acc * shrink[:, None])
            largest = peak
        head = kv_head * G + group
        if num_splits == 1:
            result = acc / weight_sum[:, None]
            tl.store(
                out + (row.to(tl.int64) * HEADS + head[:, None]) * D + columns[None, :],
                result.to(out.dtype.element_ty),
                mask=(group < G)[:, None],
            )
        else:
            place = unit * KV_HEADS + kv_head
            cells = (place * GP + group[:, None]).to(tl.int64) * D + columns[None, :]
            tl.store(partial + cells, acc, mask=(group < GP)[:, None])
            tl.store(peaks + place * (2 * GP) + group, largest, mask=group < GP)
            tl.store(peaks + place * (2 * GP) + GP + group, weight_sum, mask=group < GP)
            if arrive(counters + row * KV_HEADS + kv_head, num_splits):
                _merge(
                    out + (row.to(tl.int64) * HEADS + kv_head * G) * D,
                    partial,
                    peaks,
                    first * KV_HEADS + kv_head,
                    num_splits,
                    KV_HEADS,
                    D,
                    G,
                    GP,
                )


@triton.jit
def _merge(
    out,
    partial,
    peaks,
    place,  # of the row's first split; the next ones are KV_HEADS apart
    num_splits,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
):
    """Add a row's splits, a fixed number at a time, in ascending order."""
    AT_ONCE: tl.constexpr = 4096 // (GP * D) if GP * D < 4096 else 1
    splits = tl.arange(0, AT_ONCE)
    group = tl.arange(0, GP)
    columns = tl.arange(0, D)
    largest = tl.full([GP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    for start in range(0, num_splits, AT_ONCE):
        there = start + splits < num_splits
        at = place + (start + splits) * KV_HEADS
        cells = at[:, None] * (2 * GP) + group[None, :]
        high = tl.load(
            peaks + cells, mask=there[:, None], other=float("-inf"), cache_modifier=".cg"
        )
        sums = tl.load(peaks + cells + GP, mask=there[:, None], other=0.0, cache_modifier=".cg")
        cells = (at[:, None, None] * GP + group[None, :, None]).to(tl.int64) * D
        cells += columns[None, None, :]
        parts = tl.load(partial + cells, mask=there[:, None, None], other=0.0, cache_modifier=".cg")
        peak = tl.maximum(largest, tl.max(high, 0))
        factors = tl.exp2(high - peak[None, :])
        shrink = tl.exp2(largest - peak)
        weight_sum = weight_sum * shrink + tl.sum(sums * factors, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * factors[:, :, None], 0)
        largest = peak
    result = acc / weight_sum[:, None]
    tl.store(
        out + group[:, None] * D + columns[None, :],
        result.to(out.dtype.element_ty),
        mask=(group < G)[:, None],
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
    SPLIT: tl.constexpr,
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
        SPLIT,
        TILE,
        STAGES,
        NORM,
        GP,
        PDL,
    )


@frozen
class DecodeWork:
    """Scratch of decode attention, used anew by every layer."""

    partial: Tensor
    peaks: Tensor
    counters: Tensor  # zero between launches

    @classmethod
    def allocate(
        cls,
        num_splits: int,
        max_batch: int,
        num_heads: int,
        kv_heads: int,
        dim: int,
        device: torch.device,
    ) -> DecodeWork:
        """Room for `num_splits` splits of all rows together."""
        group = triton.next_power_of_2(num_heads // kv_heads)
        return cls(
            torch.empty(num_splits * kv_heads * group * dim, dtype=torch.float32, device=device),
            torch.empty(num_splits * kv_heads * 2 * group, dtype=torch.float32, device=device),
            torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
        )


@frozen
class DecodeRows:
    """Where the decode rows of a step stand: device tensors, int32."""

    slots: Tensor  # [batch], the row of `tables`
    positions: Tensor  # [batch]
    starts: Tensor  # [batch + 1], see the kernel
    tables: Tensor  # [slots, blocks of the longest context]


def num_splits(position: int) -> int:
    """Splits of a row whose own token stands at `position`."""
    return position // SPLIT_TOKENS + 1


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
    num_programs: int,
    pdl: bool = False,
) -> Tensor:
    """Attention of one token a row; its key and value are appended to `kv`."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads, batch = out.shape[1] // dim, out.shape[0]
    group = heads // kv_heads
    decode_attention_kernel[(num_programs,)](
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
        SPLIT_TOKENS,
        64 if dim >= 128 else 128,
        3,
        norms is not None,
        triton.next_power_of_2(group),
        pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
