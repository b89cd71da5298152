"""The scales of an 8-bit KV pool: found once, from the weights alone, so that a later engine of the
same model reads what an earlier one kept."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from agentrt.kernels import Segment
from agentrt.models.llama import LlamaModel

MOST_TOKENS = 512  # that are looked at
BLOCK_TOKENS = 64
STRIDE = 7919  # a prime: the tokens are spread over any vocabulary
# Keys and values of other tokens may be larger than any that was seen. A number of e4m3 has as many
# digits at a sixteenth of the largest as at the largest: room costs nothing.
ROOM = 2.0


@torch.inference_mode()
def largest_kv(model: LlamaModel, dtype: torch.dtype) -> Tensor:
    """What no key and no value should exceed, in size, of every layer and kv head [layers, 2,
    kv_heads], float32: ROOM times the largest of a fixed text. `dtype`: of a pool of full width."""
    spec, device = model.spec, model.embedding.device
    num_tokens = min(MOST_TOKENS, model.geometry.cos.shape[0])
    blocks = tuple(range(-(-num_tokens // BLOCK_TOKENS)))
    shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
    kv = torch.zeros(shape, dtype=dtype, device=device)
    positions = torch.arange(num_tokens, device=device)
    segments = (Segment(0, num_tokens, 0, blocks),)
    no_rows = torch.empty(0, dtype=torch.int64, device=device)
    model.forward(positions * STRIDE % spec.vocab_size, positions, segments, kv, no_rows)
    return kv.abs().amax((2, 4, 5)).float() * ROOM


def digest_of(scales: Tensor) -> str:
    """Tells scales apart, as keys and values kept with others mean something else."""
    return hashlib.sha256(scales.cpu().numpy().tobytes()).hexdigest()[:16]
