import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from agentrt.cache.keys import KEY_BYTES, Fingerprint, chunk_key, root_key

FINGERPRINT = Fingerprint(
    namespace="tenant",
    model_digest="abc",
    layout="L30",
    dtype="float32",
    arithmetic="avx",
    token_bytes=46_080,
)

texts = st.text(max_size=20)
fingerprints = st.builds(
    Fingerprint,
    namespace=texts,
    model_digest=texts,
    layout=texts,
    dtype=texts,
    arithmetic=texts,
    token_bytes=st.integers(1, 1 << 40),
)


@given(fingerprints, fingerprints)
def test_equal_bytes_mean_equal_fingerprints(one, other):
    assert (one.encode() == other.encode()) == (one == other)
    assert Fingerprint.decode(one.encode()) == one
    assert len(one.encode()) % 4 == 0


def test_text_does_not_move_from_one_field_to_the_next():
    one = evolve(FINGERPRINT, namespace="ab", model_digest="c")
    other = evolve(FINGERPRINT, namespace="a", model_digest="bc")
    assert root_key(one) != root_key(other)


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": "other"},
        {"model_digest": "abd"},
        {"layout": "L31"},
        {"dtype": "int8"},
        {"token_bytes": 1},
    ],
)
def test_every_field_changes_the_root(change):
    assert root_key(evolve(FINGERPRINT, **change)) != root_key(FINGERPRINT)


def test_a_chunk_is_named_by_all_tokens_up_to_it():
    root = root_key(FINGERPRINT)
    tokens = np.array([1, 2, 3], np.int32)
    key = chunk_key(root, tokens)
    assert len(key) == len(root) == KEY_BYTES
    assert chunk_key(root, tokens[::-1][::-1]) == key
    assert chunk_key(root, tokens[::-1]) != key
    assert chunk_key(root, tokens[:2]) != key
    assert chunk_key(key, tokens) != key
    # The same over again as one chunk is another record than as two.
    assert chunk_key(chunk_key(root, tokens[:1]), tokens[1:]) != key


def test_the_hash_can_be_replaced():
    def constant(_: bytes) -> bytes:
        return bytes(KEY_BYTES)

    assert root_key(FINGERPRINT, constant) == chunk_key(b"x", np.zeros(3, np.int32), constant)


@pytest.mark.parametrize(
    "wrong", [{"namespace": 3}, {"token_bytes": 0}, {"token_bytes": "1"}, {"layout": "x" * 5000}]
)
def test_a_senseless_fingerprint_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        evolve(FINGERPRINT, **wrong)
