"""Head norm and rotary embedding of one token's heads, as every Triton attention kernel does it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels import Geometry
from agentrt.kernels.dependent import start_next, wait_previous
from agentrt.kernels.exact import exact_options
from agentrt.kernels.narrow import narrowed


@triton.jit
def angles_at(cos, sin, position, D: tl.constexpr):
    """Cosines and signed sines [1, D] of a position."""
    columns = tl.arange(0, D)
    cosines = tl.load(cos + position * (D // 2) + columns % (D // 2))
    sines = tl.load(sin + position * (D // 2) + columns % (D // 2))
    return cosines[None, :], tl.where(columns < D // 2, -sines, sines)[None, :]


@triton.jit
def row_angles(cos, sin, positions, D: tl.constexpr):
    """The same [rows, D] of a position a row."""
    columns = tl.arange(0, D)
    cells = positions[:, None] * (D // 2) + (columns % (D // 2))[None, :]
    sines = tl.load(sin + cells)
    return tl.load(cos + cells), tl.where((columns < D // 2)[None, :], -sines, sines)


@triton.jit
def load_heads(heads, there, D: tl.constexpr):
    """Heads [H, D] from pointers to their first numbers, and the same half a head further on:
    number d turns with number d + D / 2."""
    columns = tl.arange(0, D)
    others = (columns + D // 2) % D
    values = tl.load(heads[:, None] + columns[None, :], mask=there[:, None], other=0.0)
    turned = tl.load(heads[:, None] + others[None, :], mask=there[:, None], other=0.0)
    return values, turned


@triton.jit
def rotate(
    values,  # [H, D], and `turned`, from load_heads
    turned,
    norm,  # [D], if NORM
    cosines,  # [1 or H, D], and `sines`, from angles_at or row_angles
    sines,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """The heads, normed and turned, in float32."""
    values = values.to(tl.float32)
    turned = turned.to(tl.float32)
    if NORM:
        columns = tl.arange(0, D)
        factor = tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
        values = values * factor * tl.load(norm + columns).to(tl.float32)[None, :]
        others = tl.load(norm + (columns + D // 2) % D).to(tl.float32)
        turned = turned * factor * others[None, :]
    return values * cosines + turned * sines


@triton.jit(
    do_not_specialize=["num_decode", "packed_rows"],
    do_not_specialize_on_alignment=["slots", "positions", "starts", "scales"],
)
def append_kernel(
    qkv,  # [rows, (heads + 2 * kv_heads) * D]; query heads are turned in place
    key_cache,  # [blocks, kv_heads, block_tokens, D] of one layer
    value_cache,
    tables,  # [slots, TABLE]
    slots,  # [rows]
    positions,  # [rows]; negative: an idle row, of which nothing is kept
    starts,  # [num_decode + 1]; a decode row that ends where it starts is idle too
    num_decode,
    cos,  # [context, D / 2]
    sin,
    query_norm,
    key_norm,
    eps,
    packed,  # [kv_heads, packed_rows, group, D], if PACKED: the turned queries once more
    packed_rows,
    scales,  # [2, kv_heads], if the cache is 8 bits wide: see `narrow`
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    NORM: tl.constexpr,
    HP: tl.constexpr,  # HEADS + KV_HEADS, padded to a power of two
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one row: turn queries and keys, and write keys and values into their block."""
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0)
    position = tl.load(positions + row)
    is_decode = row < num_decode
    start_tile = tl.load(starts + row, mask=is_decode, other=0)
    end_tile = tl.load(starts + row + 1, mask=is_decode, other=1)
    if position < 0 or start_tile == end_tile:
        return
    place = tables + tl.load(slots + row).to(tl.int64) * TABLE + position // BLOCK_TOKENS
    block = tl.load(place).to(tl.int64)
    start = qkv + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D)
    columns = tl.arange(0, D)
    head = tl.arange(0, HP)
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    pointers = start + head * D
    cosines, sines = angles_at(cos, sin, position, D)
    values, turned = load_heads(pointers, is_query | is_key, D)
    both = rotate(values, turned, query_norm, cosines, sines, eps, D, NORM)
    if NORM:
        key = rotate(values, turned, key_norm, cosines, sines, eps, D, NORM)
        both = tl.where(is_query[:, None], both, key)
    tl.debug_barrier()  # other threads read, as the other half, what the next lines overwrite
    wide = both
    both = both.to(qkv.dtype.element_ty)
    tl.store(pointers[:, None] + columns[None, :], both, mask=is_query[:, None])
    if PACKED:
        G: tl.constexpr = HEADS // KV_HEADS
        places = ((head // G).to(tl.int64) * packed_rows + row) * G + head % G
        tl.store(packed + places[:, None] * D + columns[None, :], both, mask=is_query[:, None])
    kv_head = head - HEADS
    cells = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
    offsets = cells[:, None] * D + columns[None, :]
    NARROW: tl.constexpr = key_cache.dtype.element_ty == tl.float8e4nv
    if NARROW:
        key_scale = tl.load(scales + kv_head, mask=is_key, other=1.0)
        both = narrowed(wide, key_scale[:, None])
    tl.store(key_cache + offsets, both, mask=is_key[:, None])
    value = tl.load(
        pointers[:, None] + KV_HEADS * D + columns[None, :], mask=is_key[:, None], other=0.0
    )
    if NARROW:
        value_scale = tl.load(scales + KV_HEADS + kv_head, mask=is_key, other=1.0)
        value = narrowed(value, value_scale[:, None])
    tl.store(value_cache + offsets, value, mask=is_key[:, None])


def append_heads(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * dim]
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    geometry: Geometry,
    norms: tuple[Tensor, Tensor] | None,
    *,
    starts: Tensor | None = None,
    packed: Tensor | None = None,
    scales: Tensor | None = None,
    is_exact: bool = False,
    pdl: bool = False,
) -> None:
    """Turn the rows' queries in place, and append their keys and values to the pool. `starts`
    are the first tiles of the decode rows, if those are here too (see `attention_decode`);
    `packed` [kv_heads, at least rows, group, dim] gets the turned queries too; `scales`
    [2, kv_heads] are those of a pool of 8 bits, see `narrow`; `is_exact`: see `exact`."""
    heads, kv_heads = geometry.num_heads, geometry.num_kv_heads
    append_kernel[(qkv.shape[0],)](
        qkv,
        kv[0],
        kv[1],
        tables,
        slots,
        positions,
        positions if starts is None else starts,
        0 if starts is None else len(starts) - 1,
        geometry.cos,
        geometry.sin,
        geometry.cos if norms is None else norms[0],
        geometry.cos if norms is None else norms[1],
        geometry.norm_eps,
        qkv if packed is None else packed,
        0 if packed is None else packed.shape[1],
        geometry.cos if scales is None else scales,
        heads,
        kv_heads,
        geometry.head_dim,
        kv.shape[3],
        tables.shape[1],
        norms is not None,
        triton.next_power_of_2(heads + kv_heads),
        packed is not None,
        pdl,
        num_warps=4,
        **exact_options(pdl, is_exact),
    )
