"""A whole decode step of one row in one cooperative launch: programs that stay, and barriers.

Between two kernels of a graph a device waits for the last program of the one and starts the first
of the other. Here as many programs as the device holds at once go through all layers together, and
fetch their first weights of the next phase while they wait at the barrier before it.

Every phase is `product_phase` or `attention_phase`, which compute what the graph's kernels do, or a
function of those kernels. Bits are those of the graph where its kernels have the same tiles and
warps. Without a GPU programs run one after another, and no barrier would ever be complete: `FIRST`
and `END` cut a step into launches of one phase each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.persistent_attention import attention_phase, locate_unit
from agentrt.kernels.persistent_grid import MOST_POLLS, announce, await_all
from agentrt.kernels.persistent_products import product_phase
from agentrt.kernels.rows import fetch_kernel
from agentrt.kernels.sample import sample_chunk

# The phases of a step. Those from QKV to DOWN come once a layer.
BEGIN, QKV, ATTEND, OUTPUT, GATE, DOWN, HEAD, SAMPLE, NUM_PHASES = range(9)

# Columns of the table of addresses, a row a layer. Those of scales, bias and head norms are only
# read where there are any.
COLUMNS = (
    *("attention_norm", "qkv", "qkv_scales", "qkv_bias", "query_norm", "key_norm"),
    *("output", "output_scales", "mlp_norm", "gate_up", "gate_up_scales", "down", "down_scales"),
    "next_norm",  # of what comes after the layer: see `persistent_batch`
)

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


@triton.jit
def pointer_at(row, column, TYPE: tl.constexpr):
    """A tensor's address from the table, as a pointer; tensors begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(TYPE)), 16)


@triton.jit(
    do_not_specialize=["first_layer", "end_layer"],
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
def persistent_kernel(
    ring,  # as in `fetch_kernel`
    step,
    flat,
    token_ids,  # [1], and what follows: parts of `flat`
    slots,  # [1]
    positions,  # [1]
    starts,  # [2]: 0, and how many tiles of context the row has
    seeds,  # [1]
    temperatures,  # [1]
    place,  # [1]
    tables,  # [slots, TABLE]
    last_tokens,  # [slots]
    outbox,
    embedding,  # [VOCAB, HIDDEN]
    addresses,  # [layers, len(COLUMNS)], int64
    final_norm,  # [HIDDEN]
    head,  # [VOCAB, HIDDEN]
    head_scales,
    kv,  # [layers, 2, blocks, kv_heads, block_tokens, D]
    cos,
    sin,
    hidden,  # [HIDDEN], float32
    row,  # [HIDDEN], the same in bf16
    qkv,  # [QKV_ROWS]
    attended,  # [HEADS * D]
    gated,  # [WIDTH]
    logits,  # [VOCAB], float32
    partial,  # see `decode_attention_kernel`
    peaks,
    counters,
    best_values,  # see `sample_kernel`
    best_tokens,
    sample_counters,
    barrier,  # [1], see `persistent_grid`
    failed,  # [1], 1 if the barriers did not hold
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
    WEIGHT: tl.constexpr,  # dtype of the matrices
    SCALED: tl.constexpr,
    QKV_R: tl.constexpr,
    QKV_BK: tl.constexpr,
    OUTPUT_R: tl.constexpr,
    OUTPUT_BK: tl.constexpr,
    GATE_R: tl.constexpr,
    GATE_BK: tl.constexpr,
    DOWN_R: tl.constexpr,
    DOWN_BK: tl.constexpr,
    HEAD_R: tl.constexpr,
    HEAD_BK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    SYNC: tl.constexpr = END - FIRST > 1
    QKV_ROWS: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    BF16: tl.constexpr = row.dtype.element_ty
    program = tl.program_id(0)
    polls = _MOST_POLLS
    if FIRST <= _BEGIN and END > _BEGIN:
        if program == 0:
            fetch_kernel(ring, step, flat, SIZE, SIZE_P, BUFFERS, False)
            tl.debug_barrier()  # what other threads have stored is read in the next line
            token = tl.load(token_ids).to(tl.int64)
            if token < 0:
                token = tl.load(last_tokens + tl.load(slots)).to(tl.int64)
            columns = tl.arange(0, HIDDEN_P)
            there = columns < HIDDEN
            values = tl.load(embedding + token * HIDDEN + columns, mask=there, other=0.0)
            tl.store(hidden + columns, values.to(tl.float32), mask=there)
            tl.store(row + columns, values, mask=there)
        if SYNC:  # the row's place in its context is the next thing to be read
            seen = announce(barrier, program, PROGRAMS)
            polls = await_all(barrier, seen, polls, failed)
    if FIRST <= _DOWN and END > _QKV:
        position = tl.load(positions)
        num_tiles = tl.load(starts + 1) - tl.load(starts)
        table = tables + tl.load(slots).to(tl.int64) * TABLE
        part, num_units, tiles_each = locate_unit(program, num_tiles, KV_HEADS, PROGRAMS)
        own_block = tl.load(table + position // BLOCK_TOKENS).to(tl.int64)
        here = addresses + first_layer * _NUM_COLUMNS
        attention_norm = pointer_at(here, 0, BF16)
        qkv_weight = pointer_at(here, 1, WEIGHT)
        qkv_scales = pointer_at(here, 2, tl.float32)
        qkv_bias = pointer_at(here, 3, BF16)
        for layer in range(first_layer, end_layer):
            here = addresses + layer * _NUM_COLUMNS
            if FIRST <= _QKV and END > _QKV:
                polls = product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    qkv_weight,
                    qkv_scales,
                    qkv_bias,
                    attention_norm,
                    row,
                    qkv,
                    qkv,
                    eps,
                    QKV_ROWS,
                    HIDDEN,
                    QKV_R,
                    QKV_BK,
                    _STORE,
                    True,
                    False,
                    SCALED,
                    BIAS,
                    PROGRAMS,
                    THREADS,
                    PREFETCH,
                    SYNC,
                )
            # Each phase's addresses are looked up before the phase before it: what is fetched at
            # the barrier must not wait for them there.
            query_norm = pointer_at(here, 4, BF16)
            key_norm = pointer_at(here, 5, BF16)
            output = pointer_at(here, 6, WEIGHT)
            output_scales = pointer_at(here, 7, tl.float32)
            if FIRST <= _ATTEND and END > _ATTEND:
                keys = kv + tl.cast(layer, tl.int64) * (2 * PART)
                polls = attention_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    part,
                    num_units,
                    tiles_each,
                    position,
                    own_block,
                    table,
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
                    eps,
                    scale,
                    HEADS,
                    KV_HEADS,
                    D,
                    BLOCK_TOKENS,
                    TILE,
                    HEAD_NORMS,
                    GP,
                    PROGRAMS,
                    THREADS,
                    SYNC,
                )
            mlp_norm = pointer_at(here, 8, BF16)
            gate_up = pointer_at(here, 9, WEIGHT)
            gate_up_scales = pointer_at(here, 10, tl.float32)
            if FIRST <= _OUTPUT and END > _OUTPUT:
                polls = product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    output,
                    output_scales,
                    row,
                    row,
                    attended,
                    hidden,
                    row,
                    eps,
                    HIDDEN,
                    HEADS * D,
                    OUTPUT_R,
                    OUTPUT_BK,
                    _ADD,
                    False,
                    True,
                    SCALED,
                    False,
                    PROGRAMS,
                    THREADS,
                    PREFETCH,
                    SYNC,
                )
            down = pointer_at(here, 11, WEIGHT)
            down_scales = pointer_at(here, 12, tl.float32)
            if FIRST <= _GATE and END > _GATE:
                polls = product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    gate_up,
                    gate_up_scales,
                    row,
                    mlp_norm,
                    row,
                    gated,
                    gated,
                    eps,
                    WIDTH,
                    HIDDEN,
                    GATE_R,
                    GATE_BK,
                    _GATE_UP,
                    True,
                    False,
                    SCALED,
                    False,
                    PROGRAMS,
                    THREADS,
                    PREFETCH,
                    SYNC,
                )
            here = addresses + tl.minimum(layer + 1, NUM_LAYERS - 1) * _NUM_COLUMNS
            attention_norm = pointer_at(here, 0, BF16)
            qkv_weight = pointer_at(here, 1, WEIGHT)
            qkv_scales = pointer_at(here, 2, tl.float32)
            qkv_bias = pointer_at(here, 3, BF16)
            if FIRST <= _DOWN and END > _DOWN:
                polls = product_phase(
                    program,
                    polls,
                    barrier,
                    failed,
                    down,
                    down_scales,
                    row,
                    row,
                    gated,
                    hidden,
                    row,
                    eps,
                    HIDDEN,
                    WIDTH,
                    DOWN_R,
                    DOWN_BK,
                    _ADD,
                    False,
                    True,
                    SCALED,
                    False,
                    PROGRAMS,
                    THREADS,
                    PREFETCH,
                    SYNC,
                )
    if FIRST <= _HEAD and END > _HEAD:
        polls = product_phase(
            program,
            polls,
            barrier,
            failed,
            head,
            head_scales,
            row,
            final_norm,
            row,
            logits,
            logits,
            eps,
            VOCAB,
            HIDDEN,
            HEAD_R,
            HEAD_BK,
            _STORE,
            True,
            False,
            SCALED,
            False,
            PROGRAMS,
            THREADS,
            PREFETCH,
            SYNC,
        )
    if FIRST <= _SAMPLE and END > _SAMPLE:
        if SYNC:
            seen = announce(barrier, program, PROGRAMS)
            polls = await_all(barrier, seen, polls, failed)
        for chunk in range(program, CHUNKS, PROGRAMS):
            sample_chunk(
                tl.program_id(1),  # row 0: the grid has one dimension
                chunk,
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
                VOCAB,
                CHUNK,
                CHUNKS,
                CHUNKS_P,
                True,
                True,
            )
