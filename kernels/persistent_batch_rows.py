"""The first and the last phase of a persistent step of several rows."""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.persistent_grid import announce, await_all
from agentrt.kernels.rows import embed_row, fetch_kernel
from agentrt.kernels.sample import sample_chunk


@triton.jit(noinline=True)
def begin_phase(
    program,
    polls,
    barrier,
    failed,
    ring,
    step,
    flat,
    token_ids,
    slots,
    last_tokens,
    embedding,
    norm,
    hidden,
    scaled,
    squares,
    batch,
    SIZE: tl.constexpr,
    SIZE_P: tl.constexpr,
    BUFFERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SYNC: tl.constexpr,
):
    """The step's inputs, and the rows of the embedding, each by a program that reads its own copy
    of the inputs."""
    MAX_BATCH: tl.constexpr = 64
    for row in range(program, batch, PROGRAMS):
        fetch_kernel(ring, step, flat, SIZE, SIZE_P, BUFFERS, False)  # all write the same
        tl.debug_barrier()  # what other threads have stored is read in the next line
        embed_row(
            row,
            token_ids,
            slots,
            last_tokens,
            embedding,
            norm,
            hidden,
            scaled,
            squares,
            HIDDEN,
            HIDDEN_P,
            True,
        )
        parts = tl.arange(0, PARTS_P)  # the row's only sum is the first
        places = squares + parts * MAX_BATCH + row
        tl.store(places, tl.zeros([PARTS_P], tl.float32), mask=(parts > 0) & (parts < PARTS))
    if SYNC:  # the rows' places in their contexts are the next thing to be read
        seen = announce(barrier, program, PROGRAMS)
        polls = await_all(barrier, seen, polls, failed)
    return polls


@triton.jit(noinline=True)
def sample_phase(
    program,
    polls,
    barrier,
    failed,
    logits,
    temperatures,
    seeds,
    slots,
    last_tokens,
    outbox,
    place,
    step,
    best_values,
    best_tokens,
    counters,
    batch,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SYNC: tl.constexpr,
):
    """A barrier, and the rows' tokens."""
    if SYNC:
        seen = announce(barrier, program, PROGRAMS)
        await_all(barrier, seen, polls, failed)
    for item in range(program, batch * CHUNKS, PROGRAMS):
        sample_chunk(
            tl.cast(item // CHUNKS, tl.int32),
            item % CHUNKS,
            logits,
            temperatures,
            seeds,
            slots,
            last_tokens,
            outbox,
            place,
            step,
            best_values,
            best_tokens,
            counters,
            VOCAB,
            CHUNK,
            CHUNKS,
            CP,
            True,
            True,
        )
