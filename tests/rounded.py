"""Attention in float32 to keys and values that are rounded to 8 bits, and nothing else is."""

import torch

from agentrt.kernels import Segment
from agentrt.kernels.narrow import KV_DTYPE, LARGEST, power_scales
from agentrt.kernels.reference import attend_segment
from agentrt.models.kv_scales import ROOM


def attend_rounded(query: torch.Tensor, kv: torch.Tensor, segment: Segment) -> torch.Tensor:
    """In place of `attend_segment`, over a pool of float32 [2, blocks, kv_heads, ...]."""
    scales = power_scales(kv.abs().amax((1, 3, 4)) * ROOM)[:, None, :, None, None]
    stored = (kv / scales).clamp(-LARGEST, LARGEST).to(KV_DTYPE)
    return attend_segment(query, stored.float() * scales, segment)
