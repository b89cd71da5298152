"""Layouts of KV in blocks and chunks: a token stays that token, wherever a copy begins and ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.kernels.kv_layout import GroupLayout, PlainLayout

LAYERS, HEADS, DIM, BLOCK_TOKENS = 2, 3, 8, 64
LAYOUTS = {"plain": PlainLayout(), "float32": GroupLayout(4), "bfloat16": GroupLayout(2)}
ITEM_BYTES = {"plain": 2, "float32": 4, "bfloat16": 2}


def empty(kind, num_tokens):
    return np.zeros((LAYERS, 2, HEADS, num_tokens, DIM * ITEM_BYTES[kind]), np.uint8)


def tokens_of(kind, seed, num_tokens):
    """One chunk of one token each: plain by its size."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 256, empty(kind, 1).shape, np.uint8) for _ in range(num_tokens)]


def read(kind, block, num_tokens):
    out = [empty(kind, 1) for _ in range(num_tokens)]
    for token, one in enumerate(out):
        LAYOUTS[kind].to_chunk(block, token, one, 0, 1)
    return out


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_go_through_a_chunk_unchanged(kind, data):
    layout = LAYOUTS[kind]
    tokens = tokens_of(kind, 1, BLOCK_TOKENS)
    block, other = empty(kind, BLOCK_TOKENS), empty(kind, BLOCK_TOKENS)
    for token, one in enumerate(tokens):
        layout.to_block(one, 0, block, token, 1)
    start = 16 * data.draw(st.integers(0, 3), label="chunk's start / 16")
    num_tokens = data.draw(st.integers(1, BLOCK_TOKENS - start), label="chunk's tokens")
    chunk = empty(kind, num_tokens)
    layout.to_chunk(block, start, chunk, 0, num_tokens)
    first = data.draw(st.integers(0, num_tokens - 1), label="first")
    num = data.draw(st.integers(1, num_tokens - first), label="num")
    layout.to_block(chunk, first, other, start + first, num)
    for token, (got, expected) in enumerate(
        zip(read(kind, other, BLOCK_TOKENS), tokens, strict=True)
    ):
        inside = start + first <= token < start + first + num
        assert np.array_equal(got, expected if inside else empty(kind, 1))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_group_is_what_the_kernels_read(kind):
    """Keys [units of dim][16], values [units of 16][dim]."""
    size = ITEM_BYTES[kind]
    block, per_unit = empty(kind, 16), 4 // size
    tokens = tokens_of(kind, 2, 16)
    for token, one in enumerate(tokens):
        LAYOUTS[kind].to_block(one, 0, block, token, 1)
    keys, values = block[1, 0, 2].reshape(-1, 16, 4), block[1, 1, 2].reshape(-1, DIM, 4)
    for token, one in enumerate(tokens):
        assert np.array_equal(keys[:, token].ravel(), one[1, 0, 2, 0])
        place = slice(token % per_unit * size, (token % per_unit + 1) * size)
        assert np.array_equal(values[token // per_unit, :, place].ravel(), one[1, 1, 2, 0])
