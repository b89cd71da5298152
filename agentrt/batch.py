"""A scheduler's plan as the tensors of one forward."""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Segment
from agentrt.scheduler import Plan, Work


@frozen
class Batch:
    """Rows are tokens; each work item is one segment of consecutive rows."""

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    output_rows: Tensor  # [samples, and drafts that they check, but for what a grammar forces]
    segments: tuple[Segment, ...]
    sampling: tuple[Work, ...]  # in the order of output_rows


def build_batch(plan: Plan, device: torch.device) -> Batch:
    """Flatten the plan's work, short segments first (as attention wants them)."""
    tokens, positions = [], []
    outputs: list[int] = []
    segments, sampling = [], []
    row = 0
    for work in sorted(plan.work, key=lambda work: work.num_tokens):
        end = work.start + work.num_tokens
        tokens.append(work.request.tokens[work.start : end])
        positions.append(np.arange(work.start, end))
        lease = work.request.lease
        assert lease is not None
        segments.append(Segment(row, work.num_tokens, work.start, tuple(lease.block_ids)))
        row += work.num_tokens
        if work.samples:
            num_read = 1 + work.num_draft - work.request.num_unread(work.num_draft)
            outputs += range(row - num_read, row)
            sampling.append(work)
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        output_rows=torch.tensor(outputs, dtype=torch.int64, device=device),
        segments=tuple(segments),
        sampling=tuple(sampling),
    )
