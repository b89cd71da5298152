"""A whole decode step of 2 to 8 rows in one cooperative launch: see `persistent`, for one row.

Its phases and barriers are those of one row's step. Products are those of `skinny`, by tensor
cores; a norm is folded in as there: who makes a row stores it times the next norm's weight, and the
sums of its squares. Two programs share a multiprocessor: each has four warps, as in the graph, and
while one waits for its first weights the other has its own on their way.

Phases are called, and not inlined: what of one does not change from layer to layer would be
computed before all, and kept in registers through the others, until threads had none left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.persistent import (
    ATTEND,
    BEGIN,
    COLUMNS,
    DOWN,
    GATE,
    HEAD,
    OUTPUT,
    QKV,
    SAMPLE,
    pointer_at,
)
from agentrt.kernels.persistent_batch_attention import batch_attention_phase, fitting_capacity
from agentrt.kernels.persistent_batch_products import batch_product_phase
from agentrt.kernels.persistent_batch_rows import begin_phase, sample_phase
from agentrt.kernels.persistent_grid import MOST_POLLS

_BEGIN = tl.constexpr(BEGIN)
_QKV = tl.constexpr(QKV)
_ATTEND = tl.constexpr(ATTEND)
_OUTPUT = tl.constexpr(OUTPUT)
_GATE = tl.constexpr(GATE)
_DOWN = tl.constexpr(DOWN)
_HEAD = tl.constexpr(HEAD)
_SAMPLE = tl.constexpr(SAMPLE)
_STORE = tl.constexpr(STORE)
_ADD = tl.constexpr(ADD)
_GATE_UP = tl.constexpr(GATE_UP)
_MOST_POLLS = tl.constexpr(MOST_POLLS)
_NUM_COLUMNS = tl.constexpr(len(COLUMNS))


@triton.jit(
    do_not_specialize=["batch", "first_layer", "end_layer"],
    do_not_specialize_on_alignment=[
        "token_ids",
        "slots",
        "positions",
        "starts",
        "seeds",
        "temperatures",
        "place",
    ],
)
def persistent_batch_kernel(
    ring,  # as in `fetch_kernel`
    step,
    flat,
    token_ids,  # [batch], and what follows: parts of `flat`
    slots,  # [batch]
    positions,  # [batch]
    starts,  # [batch + 1], see `decode_attention_kernel`
    seeds,  # [batch]
    temperatures,  # [batch]
    place,  # [1]
    tables,  # [slots, TABLE]
    last_tokens,  # [slots]
    outbox,
    embedding,  # [VOCAB, HIDDEN]
    addresses,  # [layers, len(COLUMNS)], int64
    head,  # [VOCAB, HIDDEN]
    kv,  # [layers, 2, blocks, kv_heads, block_tokens, D]
    cos,
    sin,
    hidden,  # [batch, HIDDEN], float32
    scaled,  # [batch, HIDDEN]: hidden times the next norm's weight
    squares,  # [PARTS, MAX_BATCH]: of hidden, of each tile of its rows
    qkv,  # [batch, QKV_ROWS]
    attended,  # [batch, HEADS * D]
    gated,  # [batch, WIDTH]
    logits,  # [batch, VOCAB], float32
    sums,  # of the splits of a product, see `skinny_kernel`
    arrivals,
    partial,  # see `decode_attention_kernel`
    peaks,
    counters,
    best_values,  # see `sample_kernel`
    best_tokens,
    sample_counters,
    barrier,  # [1], see `persistent_grid`
    failed,  # [1], 1 if the barriers did not hold
    batch,
    first_layer,
    end_layer,
    eps,
    scale,
    FIRST: tl.constexpr,  # the phases FIRST .. END are computed
    END: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    SIZE: tl.constexpr,  # of flat
    SIZE_P: tl.constexpr,
    BUFFERS: tl.constexpr,
    TABLE: tl.constexpr,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PART: tl.constexpr,  # numbers of one layer's keys
    TILE: tl.constexpr,
    GP: tl.constexpr,
    HEAD_NORMS: tl.constexpr,
    BIAS: tl.constexpr,
    QKV_ITEMS: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    QKV_BK: tl.constexpr,
    OUTPUT_ITEMS: tl.constexpr,
    OUTPUT_SPLITS: tl.constexpr,
    OUTPUT_BK: tl.constexpr,
    GATE_ITEMS: tl.constexpr,
    GATE_SPLITS: tl.constexpr,
    GATE_BK: tl.constexpr,
    DOWN_ITEMS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    DOWN_BK: tl.constexpr,
    HEAD_ITEMS: tl.constexpr,
    HEAD_SPLITS: tl.constexpr,
    HEAD_BK: tl.constexpr,
    BP: tl.constexpr,  # the batch as products see it
    STAGES: tl.constexpr,
    ATTENTION_STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    SYNC: tl.constexpr = END - FIRST > 1
    QKV_ROWS: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    BF16: tl.constexpr = scaled.dtype.element_ty
    program = tl.program_id(0)
    polls = _MOST_POLLS
    work = (scaled, squares, sums, arrivals, batch, eps)
    if FIRST <= _BEGIN and END > _BEGIN:
        polls = begin_phase(
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
            pointer_at(addresses, 0, BF16),
            hidden,
            scaled,
            squares,
            batch,
            SIZE,
            SIZE_P,
            BUFFERS,
            HIDDEN,
            HIDDEN_P,
            PARTS,
            PARTS_P,
            PROGRAMS,
            SYNC,
        )
    if FIRST <= _DOWN and END > _QKV:
        capacity, num_items = fitting_capacity(starts, batch, KV_HEADS, BP, PROGRAMS)
        here = addresses + first_layer * _NUM_COLUMNS
        qkv_weight = pointer_at(here, 1, BF16)
        qkv_bias = pointer_at(here, 3, BF16)
        for layer in range(first_layer, end_layer):
            here = addresses + layer * _NUM_COLUMNS
            if FIRST <= _QKV and END > _QKV:
                polls = batch_product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    qkv_weight,
                    qkv_bias,
                    scaled,
                    qkv,
                    scaled,
                    *work,
                    QKV_ROWS,
                    HIDDEN,
                    QKV_ITEMS,
                    QKV_SPLITS,
                    QKV_BK,
                    _STORE,
                    True,
                    False,
                    BIAS,
                    *(PARTS, BP, STAGES, PROGRAMS, PREFETCH, SYNC),
                )
            # Each phase's addresses are looked up before the phase before it, as for one row.
            query_norm = pointer_at(here, 4, BF16)
            key_norm = pointer_at(here, 5, BF16)
            if FIRST <= _ATTEND and END > _ATTEND:
                keys = kv + tl.cast(layer, tl.int64) * (2 * PART)
                polls = batch_attention_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    capacity,
                    num_items,
                    slots,
                    positions,
                    starts,
                    tables,
                    cos,
                    sin,
                    qkv,
                    keys,
                    keys + PART,
                    attended,
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
                    ATTENTION_STAGES,
                    HEAD_NORMS,
                    GP,
                    PROGRAMS,
                    THREADS,
                    PREFETCH > 0,
                    SYNC,
                )
            output = pointer_at(here, 6, BF16)
            mlp_norm = pointer_at(here, 8, BF16)
            gate_up = pointer_at(here, 9, BF16)
            if FIRST <= _OUTPUT and END > _OUTPUT:
                polls = batch_product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    output,
                    output,
                    attended,
                    hidden,
                    mlp_norm,
                    *work,
                    HIDDEN,
                    HEADS * D,
                    OUTPUT_ITEMS,
                    OUTPUT_SPLITS,
                    OUTPUT_BK,
                    _ADD,
                    False,
                    True,
                    False,
                    *(PARTS, BP, STAGES, PROGRAMS, PREFETCH, SYNC),
                )
            down = pointer_at(here, 11, BF16)
            next_norm = pointer_at(here, 13, BF16)
            if FIRST <= _GATE and END > _GATE:
                polls = batch_product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    gate_up,
                    gate_up,
                    scaled,
                    gated,
                    scaled,
                    *work,
                    WIDTH,
                    HIDDEN,
                    GATE_ITEMS,
                    GATE_SPLITS,
                    GATE_BK,
                    _GATE_UP,
                    True,
                    False,
                    False,
                    *(PARTS, BP, STAGES, PROGRAMS, PREFETCH, SYNC),
                )
            here = addresses + tl.minimum(layer + 1, NUM_LAYERS - 1) * _NUM_COLUMNS
            qkv_weight = pointer_at(here, 1, BF16)
            qkv_bias = pointer_at(here, 3, BF16)
            if FIRST <= _DOWN and END > _DOWN:
                polls = batch_product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    down,
                    down,
                    gated,
                    hidden,
                    next_norm,
                    *work,
                    HIDDEN,
                    WIDTH,
                    DOWN_ITEMS,
                    DOWN_SPLITS,
                    DOWN_BK,
                    _ADD,
                    False,
                    True,
                    False,
                    *(PARTS, BP, STAGES, PROGRAMS, PREFETCH, SYNC),
                )
    if FIRST <= _HEAD and END > _HEAD:
        polls = batch_product_phase(
            program,
            polls,
            barrier,
            failed,
            head,
            head,
            scaled,
            logits,
            scaled,
            *work,
            VOCAB,
            HIDDEN,
            HEAD_ITEMS,
            HEAD_SPLITS,
            HEAD_BK,
            _STORE,
            True,
            False,
            False,
            *(PARTS, BP, STAGES, PROGRAMS, PREFETCH, SYNC),
        )
    if FIRST <= _SAMPLE and END > _SAMPLE:
        sample_phase(
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
            sample_counters,
            batch,
            VOCAB,
            CHUNK,
            CHUNKS,
            CHUNKS_P,
            PROGRAMS,
            SYNC,
        )
