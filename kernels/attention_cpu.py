"""Paged causal attention with torch's own operations, for a CPU without the native kernels.

A segment's context is gathered from its blocks, and torch attends to it. What order that sums in
depends on the shapes and on the processor: no bits are promised here (`native_attention.c` does).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Segment
from agentrt.kernels.reference import row_slots


@frozen
class SegmentPlan:
    """One segment: its rows, the blocks of its context, and who sees what."""

    rows: slice
    blocks: Tensor  # [blocks]
    end: int  # of the context, in tokens
    mask: Tensor | None  # bool [rows, end]; None for a single row, which sees everything


@frozen
class CpuPlan:
    """See `agentrt.kernels.plain.AttentionPlan`."""

    segments: tuple[SegmentPlan, ...]
    kv: Tensor
    blocks: Tensor  # [rows]: the block of each row's own position
    offsets: Tensor  # [rows]: and the place within it

    def append_kv(self, layer: int, key_value: Tensor) -> None:
        for cache, new in zip(self.kv[layer], key_value.unbind(1), strict=True):
            cache[self.blocks, :, self.offsets] = new

    def attend(self, layer: int, query: Tensor) -> Tensor:
        out = torch.empty_like(query)
        for segment in self.segments:
            context = self.kv[layer][:, segment.blocks].transpose(1, 2).flatten(2, 3)
            key, value = context[:, :, : segment.end].unsqueeze(1)  # [1, kv_heads, end, dim]
            heads_first = query[segment.rows].transpose(0, 1).unsqueeze(0)
            attended = F.scaled_dot_product_attention(
                heads_first, key, value, attn_mask=segment.mask, enable_gqa=True
            )
            out[segment.rows] = attended[0].transpose(0, 1)
        return out


def plan_attention(segments: tuple[Segment, ...], kv: Tensor) -> CpuPlan:
    """Prepare one step over kv [layers, 2, blocks, kv_heads, block_tokens, dim]."""
    places = torch.tensor(list(row_slots(segments, kv.shape[4])))
    plans = tuple(_plan_segment(segment, kv.shape[4]) for segment in segments)
    return CpuPlan(plans, kv, places[:, 0], places[:, 1])


def _plan_segment(segment: Segment, block_tokens: int) -> SegmentPlan:
    rows = slice(segment.first_row, segment.first_row + segment.num_rows)
    end = segment.start_position + segment.num_rows
    blocks = torch.tensor(segment.block_ids[: -(-end // block_tokens)])
    mask = None
    if segment.num_rows > 1:
        positions = torch.arange(segment.start_position, end)
        mask = torch.arange(end)[None, :] <= positions[:, None]
    return SegmentPlan(rows, blocks, end, mask)
