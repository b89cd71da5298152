import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt.cache.keys import FORMAT_VERSION
from agentrt.cache.record import (
    MAX_HEADER_BYTES,
    claimed_header_bytes,
    decode_header,
    make_header,
)
from agentrt.cache.tier import Record

FINGERPRINT = b"whose it is."


def make_record(token_ids=(5, 6, 7), **changes):
    fields = {
        "key": b"k" * 16,
        "parent": b"p" * 16,
        "token_ids": np.array(token_ids, np.int32),
        "start": 64,
        "num_bytes": 300,
        "last_used_s": 12.5,
    }
    return Record(**{**fields, **changes})


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=70),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False),
)
def test_a_header_says_what_was_put_in(token_ids, start, num_bytes, checksum, last_used_s):
    record = make_record(token_ids, start=start, num_bytes=num_bytes, last_used_s=last_used_s)
    made = make_header(record, FINGERPRINT, checksum)
    header = decode_header(made.raw)
    assert header == made == decode_header(made.raw, trusted=True)
    assert header.fingerprint == FINGERPRINT
    assert header.payload_checksum == checksum
    assert header.holds(record)
    assert claimed_header_bytes(made.raw + b"payload") == len(made.raw)
    found = header.record(99.0)
    assert (found.key, found.parent, found.start) == (record.key, record.parent, start)
    assert (found.num_bytes, found.last_used_s, found.end) == (
        num_bytes,
        99.0,
        start + len(token_ids),
    )
    assert found.token_ids.tolist() == token_ids
    assert found.holds(record.parent, record.token_ids)


def test_any_flipped_bit_is_found():
    raw = make_header(make_record(), FINGERPRINT, 7).raw
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_header(bytes(damaged)) is None, bit


def test_any_other_length_is_refused():
    raw = make_header(make_record(), FINGERPRINT, 7).raw
    assert all(decode_header(raw[:length]) is None for length in range(len(raw)))
    assert decode_header(raw + b"\0") is None
    assert decode_header(raw[:-1], trusted=True) is None


def test_another_version_is_no_header(monkeypatch):
    raw = make_header(make_record(), FINGERPRINT, 7).raw
    monkeypatch.setattr("agentrt.cache.record.FORMAT_VERSION", FORMAT_VERSION + 1)
    assert decode_header(raw) is None
    assert decode_header(raw, trusted=True) is None
    assert claimed_header_bytes(raw) is None


def test_a_header_cannot_claim_the_memory():
    raw = bytearray(make_header(make_record(), FINGERPRINT, 7).raw)
    raw[8:12] = (MAX_HEADER_BYTES // 4).to_bytes(4, "little")
    assert claimed_header_bytes(bytes(raw)) is None
    assert claimed_header_bytes(b"") is None


@pytest.mark.parametrize(
    "other",
    [
        make_record((5, 6, 8)),
        make_record((5, 6)),
        make_record(parent=b"q" * 16),
        make_record(start=0),
        make_record(num_bytes=301),
    ],
)
def test_the_key_alone_does_not_decide(other):
    assert not make_header(make_record(), FINGERPRINT, 7).holds(other)
