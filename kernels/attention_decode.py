"""Paged attention of decode rows: head norm, rotary embedding, append, and split softmax in one.

A row's context is cut into splits at absolute positions: of SPLIT_TOKENS tokens, doubled until
there are no more than MAX_SPLITS of them, so that merging stays short. A program takes an even
share of all (row, kv head, split) items, consecutive ones, and streams through their keys and
values; it turns the queries itself, and who has a row's last split also turns its key and writes
key and value to the cache. The last split of a row and kv head to
arrive adds all of them in a fixed order (Flash-Decoding's merge), so that a row's bits depend on
its own context alone: not on the batch, nor on the number of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from agentrt.kernels.dependent import arrive_with, dot, prefetch, start_next, wait_previous
from agentrt.kernels.gemv import launch_options
from agentrt.kernels.rotary import angles_at, load_heads, rotate

SPLIT_TOKENS = 256
MAX_SPLITS = 64
MAX_BATCH = 64  # with more rows another kernel is compiled
_LOG2_E = tl.constexpr(1.4426950408889634)
NUM_THREADS = 128
_THREADS = tl.constexpr(NUM_THREADS)
_SPLIT_TOKENS = tl.constexpr(SPLIT_TOKENS)
_LONG = tl.constexpr(SPLIT_TOKENS * MAX_SPLITS)
_DOUBLINGS = tl.constexpr(10)


@triton.jit
def _block(table, index, there):
    """A block id, as two halves: a load of less than 32 bits is no asynchronous copy. As one, it
    would take a stage of the pipeline, and leave no second tile in flight (Triton 3.6)."""
    halves = table.to(tl.pointer_type(tl.uint16)) + 2 * index
    low = tl.load(halves, mask=there, other=0).to(tl.int64)
    return low + tl.load(halves + 1, mask=there, other=0).to(tl.int64) * 65536


@triton.jit
def load_tile(
    cache,
    table,
    start,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys or values [TILE, D] of a paged context from `start` on, zero from `end` on."""
    offsets = tl.arange(0, TILE)
    if TILE <= BLOCK_TOKENS:
        block = _block(table, start // BLOCK_TOKENS, start < end)
        cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + start % BLOCK_TOKENS + offsets
    else:
        block = tl.zeros([TILE], tl.int64)
        for i in tl.static_range(TILE // BLOCK_TOKENS):
            token = start + i * BLOCK_TOKENS
            one = _block(table, token // BLOCK_TOKENS, token < end)
            block = tl.where(offsets // BLOCK_TOKENS == i, one, block)
        cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + offsets % BLOCK_TOKENS
    places = cells[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(cache + places, mask=(start + offsets < end)[:, None], other=0.0)


@triton.jit
def _split_tokens(position):
    """Tokens of a split of the row whose own token stands at `position`; see `split_tokens`."""
    times = position // _LONG
    factor = 1
    for i in tl.static_range(_DOUBLINGS):
        factor += tl.where(times >= 1 << i, 1 << i, 0)
    return _SPLIT_TOKENS * factor


@triton.jit
def _locate(item, stop, slots, positions, starts, batch, KV_HEADS: tl.constexpr, BP: tl.constexpr):
    """An item's row, and of that row the first split, how many there are, position and slot.
    Where there is no item (item == stop), those of some row."""
    index = tl.arange(0, BP)
    firsts = tl.load(starts + index, mask=index < batch, other=2147483647)
    row = tl.maximum(tl.sum((firsts <= item // KV_HEADS).to(tl.int32), 0) - 1, 0)
    row = tl.minimum(row, batch - 1)
    first = tl.load(starts + row)
    num_splits = tl.maximum(tl.load(starts + row + 1) - first, 1)
    return row, first, num_splits, tl.load(positions + row), tl.load(slots + row)


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
    starts,  # [batch + 1]: row i has the splits starts[i] .. starts[i + 1]; without any it is idle
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
    # All that the host has sent is read before the wait, and the first keys are asked for.
    total = tl.load(starts + batch) * KV_HEADS
    item = (program * total.to(tl.int64) // num_programs).to(tl.int32)
    stop = ((program + 1) * total.to(tl.int64) // num_programs).to(tl.int32)
    row, first, num_splits, position, slot = _locate(
        item, stop, slots, positions, starts, batch, KV_HEADS, BP
    )
    cosines, sines = angles_at(cos, sin, position, D)
    if PDL and item < stop:
        inside = item - first * KV_HEADS
        _prefetch_split(
            inside % num_splits * _split_tokens(position),
            position,
            tables + slot.to(tl.int64) * TABLE,
            inside // num_splits,
            key_cache,
            value_cache,
            KV_HEADS,
            D,
            BLOCK_TOKENS,
        )
    if (item < stop) | (program == 0):  # programs without work leave room for the next kernel
        wait_previous(PDL)
    group = tl.arange(0, M)
    columns = tl.arange(0, D)
    tokens = tl.arange(0, TILE)
    one = tl.arange(0, 1)
    while item < stop:
        # One row and kv head: the splits from `split` on, as many as this program has.
        inside = item - first * KV_HEADS
        kv_head = inside // num_splits
        split = inside % num_splits
        tokens_each = _split_tokens(position)
        until = tl.minimum(split + stop - item, num_splits)
        place = first * KV_HEADS + kv_head * num_splits  # of the row's and head's first split
        table = tables + slot.to(tl.int64) * TABLE
        has_own = until == num_splits
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
        largest = tl.full([M], float("-inf"), tl.float32)
        weight_sum = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        end = tl.minimum(until * tokens_each, position)  # of the cached tokens
        for start in tl.range(split * tokens_each, end, TILE, num_stages=STAGES):
            there = start + tokens < end
            keys = load_tile(key_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE)
            scores = dot(query, tl.trans(keys.to(query.dtype)), tl.zeros([M, TILE], tl.float32))
            scores = tl.where(there[None, :], scores * (scale * _LOG2_E), float("-inf"))
            peak = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - peak[:, None])
            shrink = tl.exp2(largest - peak)
            weight_sum = weight_sum * shrink + tl.sum(weights, 1)
            values = load_tile(
                value_cache, table, start, end, kv_head, KV_HEADS, BLOCK_TOKENS, D, TILE
            )
            acc = dot(weights.to(query.dtype), values.to(query.dtype), acc * shrink[:, None])
            largest = peak
            if (start + TILE) % tokens_each == 0 and (
                start + TILE < until * tokens_each or not has_own
            ):
                done = place + start // tokens_each
                _store_split(partial, peaks, done, acc, largest, weight_sum, M, D, GP)
                largest = tl.full([M], float("-inf"), tl.float32)
                weight_sum = tl.zeros([M], tl.float32)
                acc = tl.zeros([M, D], tl.float32)
        if has_own:
            key = rotate(own_values, own_turned, key_norm, cosines, sines, eps, D, NORM)
            key = key.to(key_cache.dtype.element_ty)
            value = own_value.to(value_cache.dtype.element_ty)
            block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
            cell = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
            tl.store(key_cache + cell * D + one[:, None] * 0 + columns[None, :], key)
            tl.store(value_cache + cell * D + columns, value)
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (scale * _LOG2_E)
            peak = tl.maximum(largest, score)
            shrink = tl.exp2(largest - peak)
            weight = tl.exp2(score - peak)
            weight_sum = weight_sum * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            largest = peak
            if num_splits > 1:
                done = place + num_splits - 1
                _store_split(partial, peaks, done, acc, largest, weight_sum, M, D, GP)
        target = out + (row.to(tl.int64) * HEADS + kv_head * G) * D
        if num_splits == 1:
            result = acc / weight_sum[:, None]
            tl.store(
                target + group[:, None] * D + columns[None, :],
                result.to(out.dtype.element_ty),
                mask=(group < G)[:, None],
            )
        elif arrive_with(counters + row * KV_HEADS + kv_head, until - split, num_splits):
            _merge(target, partial, peaks, place, num_splits, D, G, GP)
        item += until - split
        if item < stop:
            row, first, num_splits, position, slot = _locate(
                item, stop, slots, positions, starts, batch, KV_HEADS, BP
            )
            cosines, sines = angles_at(cos, sin, position, D)


@triton.jit
def _prefetch_split(
    begin,
    position,
    table,
    kv_head,
    key_cache,
    value_cache,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Keys and values of earlier steps: a piece of a block a thread. Only they may be asked for
    before the kernel's predecessor has ended."""
    lane = tl.arange(0, _THREADS)
    PIECES: tl.constexpr = _THREADS * BLOCK_TOKENS // (2 * _SPLIT_TOKENS)  # of a block's keys
    token = tl.minimum(begin + lane // (2 * PIECES) * BLOCK_TOKENS, position)
    block = tl.load(table + token // BLOCK_TOKENS).to(tl.int64)
    cell = (block * KV_HEADS + kv_head) * (BLOCK_TOKENS * D)
    piece = cell + lane // 2 % PIECES * (BLOCK_TOKENS * D // PIECES)
    nbytes: tl.constexpr = (
        BLOCK_TOKENS * D // PIECES * (key_cache.dtype.element_ty.primitive_bitwidth // 8)
    )
    source = tl.where(lane % 2 == 0, key_cache + piece, value_cache + piece)
    prefetch(source, tl.full([_THREADS], nbytes, tl.int32), True)


@triton.jit
def _store_split(
    partial,
    peaks,
    place,
    acc,
    largest,
    weight_sum,
    M: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
):
    """Keep a split's sums until all splits of its row are there."""
    group = tl.arange(0, M)
    cells = (place * GP + group[:, None]).to(tl.int64) * D + tl.arange(0, D)[None, :]
    tl.store(partial + cells, acc, mask=(group < GP)[:, None])
    tl.store(peaks + place * (2 * GP) + group, largest, mask=group < GP)
    tl.store(peaks + place * (2 * GP) + GP + group, weight_sum, mask=group < GP)


@triton.jit
def _merge(
    out,
    partial,
    peaks,
    place,  # of the first split
    num_splits,
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
    for start in tl.range(0, num_splits, AT_ONCE, num_stages=3):
        there = start + splits < num_splits
        at = place + start + splits
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
    return position // split_tokens(position) + 1


def split_tokens(position: int) -> int:
    """Tokens of each: it depends on the row's own context alone."""
    return SPLIT_TOKENS << (position // (SPLIT_TOKENS * MAX_SPLITS)).bit_length()


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
    tile: tuple[int, int, int] | None = None,  # tokens, stages, warps
    pdl: bool = False,
) -> Tensor:
    """Attention of one token a row; its key and value are appended to `kv`."""
    _, _, kv_heads, block_tokens, dim = kv.shape
    heads, batch = out.shape[1] // dim, out.shape[0]
    group = heads // kv_heads
    tile = tile or (128 if dim < 128 else 64, 3, 4)
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
        tile[0],
        tile[1],
        norms is not None,
        triton.next_power_of_2(group),
        pdl,
        num_warps=tile[2],
        **launch_options(pdl),
    )
    return out
