"""Logits to token ids on the device: the largest, or a draw by the Gumbel-max method.

`argmax(logits / T + g)` with independent Gumbel noise g is a draw from softmax(logits / T) (Gumbel
1954). The noise comes from a counter (Philox) over the row's own seed and the token id: a draw does
not depend on what else is in the batch. Ties go to the lowest id.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels.dependent import arrive, start_next, wait_previous
from agentrt.kernels.gemv import launch_options

CHUNK = 4096  # logits of a program


@triton.jit
def sample_chunk(
    row,
    chunk,
    logits,  # [rows, VOCAB]
    temperatures,  # [rows], 0 for greedy
    seeds,  # [rows]
    slots,  # [rows]
    last_tokens,  # [slots]
    tokens,  # [rows]
    place,  # [1], where in `tokens` this step's begin, if PLACED
    step,  # [1], counted up, if COUNTED
    best_values,  # [rows, CHUNKS] scratch
    best_tokens,  # [rows, CHUNKS] scratch
    counters,  # [rows], zero
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CP: tl.constexpr,
    PLACED: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """A row's token, by as many programs as the row has chunks."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(
        logits + row.to(tl.int64) * VOCAB + ids, mask=ids < VOCAB, other=float("-inf")
    ).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        uniform = tl.rand(tl.load(seeds + row), ids)
        # 2^-25 keeps the logarithm finite; the largest float32 below 1 does so on the other side
        uniform = tl.minimum(tl.maximum(uniform, 2.9802322e-08), 0.99999994)
        values = values / temperature - tl.log(-tl.log(uniform))
    best = tl.max(values, 0)
    token = tl.min(tl.where(values == best, ids, 2147483647), 0)
    tl.store(best_values + row * CHUNKS + chunk, best)
    tl.store(best_tokens + row * CHUNKS + chunk, token)
    if arrive(counters + row, CHUNKS):
        chunks = tl.arange(0, CP)
        there = chunks < CHUNKS
        bests = tl.load(
            best_values + row * CHUNKS + chunks,
            mask=there,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        candidates = tl.load(
            best_tokens + row * CHUNKS + chunks, mask=there, other=0, cache_modifier=".cg"
        )
        winner = tl.min(tl.where((bests == tl.max(bests, 0)) & there, candidates, 2147483647), 0)
        winner = tl.minimum(winner, VOCAB - 1)  # a row of NaN has no winner
        own = tokens + row
        if PLACED:
            own += tl.load(place)
        tl.store(own, winner)
        if COUNTED:
            tl.store(step, tl.load(step) + 1, mask=row == 0)
        tl.store(last_tokens + tl.load(slots + row), winner)


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    seeds,
    slots,
    last_tokens,
    tokens,
    place,
    step,
    best_values,
    best_tokens,
    counters,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CP: tl.constexpr,
    PLACED: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    sample_chunk(
        tl.program_id(0),
        tl.program_id(1),
        logits,
        temperatures,
        seeds,
        slots,
        last_tokens,
        tokens,
        place,
        step,
        best_values,
        best_tokens,
        counters,
        VOCAB,
        CHUNK,
        CHUNKS,
        CP,
        PLACED,
        COUNTED,
    )


def num_chunks(vocab_size: int) -> int:
    """Programs of a row, and the width of the scratch."""
    return triton.cdiv(vocab_size, CHUNK)


def sample_rows(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    slots: Tensor,
    last_tokens: Tensor,
    tokens: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor],
    *,
    place: Tensor | None = None,
    step: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Draw one token a row into `tokens`, and into the slot's place in `last_tokens`.

    `tokens` may be in the host's memory; with `place`, a number on the device, this step's begin
    there. `step` is counted up.
    """
    rows, vocab = logits.shape
    chunks = num_chunks(vocab)
    sample_kernel[(rows, chunks)](
        logits,
        temperatures,
        seeds,
        slots,
        last_tokens,
        tokens,
        tokens if place is None else place,
        tokens if step is None else step,
        *scratch,
        vocab,
        CHUNK,
        chunks,
        triton.next_power_of_2(chunks),
        place is not None,
        step is not None,
        pdl,
        num_warps=8,
        **launch_options(pdl),
    )
