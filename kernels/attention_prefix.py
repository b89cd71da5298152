"""Attention of a long chunk to the long context before it, by cuDNN on gathered keys and values.

On an H100, 2,048 rows after 14,336 tokens took 1.21 ms with the Triton kernel (dim 128, 32 heads)
and 0.81 with cuDNN, which reads no block tables: so the whole blocks before the chunk are copied
together first. cuDNN sees the group's query heads as further rows of one head, and no mask.

cuDNN plans each shape anew: 70 to 130 ms of the calling thread, once a thread. So there are few
shapes: a whole step of rows, whatever the chunk has, and multiples of PREFIX_TOKENS tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels.attention_prefill import Prefix

# Of one layer: with less work than this the copies and launches cost more than they save.
MIN_FLOPS = 1e11
PREFIX_TOKENS = 2048
MOST_PLANNED = 24  # lengths that are planned ahead


@triton.jit(do_not_specialize_on_alignment=["scales"])
def gather_kernel(
    cache,  # [2, blocks, kv_heads, block_tokens, D] of one layer
    table,  # [number of blocks]
    out,  # [2, kv_heads, tokens, D]
    scales,  # [2, kv_heads], if NARROW: see `narrow`
    num_blocks,  # in the cache
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # block_tokens * D
    NARROW: tl.constexpr,
):
    index, head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.load(table + index).to(tl.int64)
    source = ((which * num_blocks + block) * KV_HEADS + head) * BLOCK
    target = ((which * KV_HEADS + head).to(tl.int64) * tl.num_programs(0) + index) * BLOCK
    numbers = tl.arange(0, BLOCK)
    found = tl.load(cache + source + numbers)
    if NARROW:  # keys as they were before, exactly; values as they are stored
        scale = tl.load(scales + head, mask=which == 0, other=1.0)
        found = (found.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + target + numbers, found)


def gather(kv: Tensor, table: Tensor, scales: Tensor | None = None) -> Tensor:
    """Keys and values [2, kv_heads, tokens, dim] of the blocks in `table`. With `scales`
    [2, kv_heads] the keys of a pool of 8 bits times theirs, and its values without; in bfloat16,
    which holds them all."""
    _, num_blocks, kv_heads, block_tokens, dim = kv.shape
    dtype = kv.dtype if scales is None else torch.bfloat16
    out = kv.new_empty(2, kv_heads, len(table) * block_tokens, dim, dtype=dtype)
    gather_kernel[(len(table), kv_heads, 2)](
        kv,
        table,
        out,
        table if scales is None else scales,
        num_blocks,
        kv_heads,
        block_tokens * dim,
        scales is not None,
        num_warps=4,
    )
    return out


def prefix_tokens(num_heads: int, dim: int, num_rows: int, position: int, most_rows: int) -> int:
    """How many tokens before a chunk of `num_rows` rows at `position` should be attended to in
    this way. A chunk counts as one of `most_rows`, of which it must be half at least."""
    num_tokens = position // PREFIX_TOKENS * PREFIX_TOKENS
    is_worth_it = 4.0 * num_heads * dim * num_rows * num_tokens >= MIN_FLOPS
    return num_tokens if is_worth_it and 2 * num_rows >= most_rows else 0


def lengths_to_plan(num_heads: int, dim: int, num_rows: int, max_tokens: int) -> list[int]:
    """What `prefix_tokens` gives for whole steps of a context of `max_tokens`, shortest first."""
    lengths = (
        prefix_tokens(num_heads, dim, num_rows, position, num_rows)
        for position in range(PREFIX_TOKENS, max_tokens, PREFIX_TOKENS)
    )
    return [length for length in lengths if length][:MOST_PLANNED]


def attend_prefix(
    query: Tensor,  # [kv_heads, rows, group, dim], queries turned
    num_rows: int,  # those that count: the others are there for the shape, and may hold anything
    kv: Tensor,  # [2, blocks, kv_heads, block_tokens, dim] of one layer
    table: Tensor,  # the blocks before the chunk, all full
    scales: Tensor | None = None,  # [2, kv_heads], of a pool of 8 bits: see `narrow`
) -> Prefix:
    """Attention of all rows to all tokens of the blocks."""
    kv_heads, _, group, dim = query.shape
    key, value = gather(kv, table, scales)
    out, lse = _attend(query.view(1, kv_heads, -1, dim), key[None], value[None])
    num = num_rows * group
    found = out[0, :, :num].contiguous(), lse.reshape(kv_heads, -1)[:, :num].contiguous()
    return Prefix(*found, key.shape[1])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and its log-sum-exp. On a CPU (tests) by torch's flash kernel."""
    aten, scale = torch.ops.aten, query.shape[-1] ** -0.5
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, False, False, scale=scale
    )
    return out, lse
