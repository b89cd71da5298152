"""The header of a record on disk: what it is, whose it is, and the checksums of it and its payload.

A header is self-contained, so that a payload file alone is enough to find all that lies in it:

    fixed part | encoded fingerprint | token ids (int32) | xxh3_64 of all before
"""

import struct
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from agentrt.cache.keys import FORMAT_VERSION
from agentrt.cache.node import TokenArray
from agentrt.cache.tier import Record

MAGIC = b"aKVr"
# magic, version, bytes of the fingerprint, tokens, start, payload bytes, payload checksum,
# last use, key, parent
_FIXED = struct.Struct("<4sHHIQQQd16s16s")
_CHECKSUM = struct.Struct("<Q")
MIN_HEADER_BYTES = _FIXED.size + _CHECKSUM.size
MAX_HEADER_BYTES = 1 << 20  # 260,000 tokens a chunk: far above any sane one


class Header(NamedTuple):
    """A decoded header. `raw` is all of it; the token ids of its record are a view into it.

    A tuple since it is made fast: 100,000 of them are read at an opening.
    """

    raw: bytes
    fingerprint: bytes
    num_tokens: int
    start: int
    payload_bytes: int
    payload_checksum: int
    last_used_s: float
    key: bytes
    parent: bytes

    def token_ids(self) -> TokenArray:
        """The tokens, as a view."""
        position = _FIXED.size + len(self.fingerprint)
        return np.frombuffer(self.raw, "<i4", self.num_tokens, position)

    def holds(self, record: Record) -> bool:
        """Whether this is the header of the same tokens at the same place."""
        return (
            self.parent == record.parent
            and self.start == record.start
            and self.payload_bytes == record.num_bytes
            and np.array_equal(self.token_ids(), record.token_ids)
        )

    def record(self, last_used_s: float) -> Record:
        """The record, with a newer last use than the header's own."""
        return Record(
            key=self.key,
            parent=self.parent,
            token_ids=self.token_ids(),
            start=self.start,
            num_bytes=self.payload_bytes,
            last_used_s=last_used_s,
        )


def make_header(record: Record, fingerprint: bytes, payload_checksum: int) -> Header:
    """The header of a record whose fingerprint encodes to `fingerprint`."""
    fixed = _FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        len(fingerprint),
        len(record.token_ids),
        record.start,
        record.num_bytes,
        payload_checksum,
        record.last_used_s,
        record.key,
        record.parent,
    )
    body = fixed + fingerprint + np.ascontiguousarray(record.token_ids, dtype="<i4").tobytes()
    raw = body + _CHECKSUM.pack(xxh3_64_intdigest(body))
    return Header(raw, fingerprint, *_FIXED.unpack_from(raw)[3:])


def claimed_header_bytes(start: bytes) -> int | None:
    """How long the header that begins with `start` says to be; None if none begins so."""
    if len(start) < MIN_HEADER_BYTES:
        return None
    magic, version, fingerprint_bytes, num_tokens = _FIXED.unpack_from(start)[:4]
    claimed: int = MIN_HEADER_BYTES + fingerprint_bytes + 4 * num_tokens
    is_header = magic == MAGIC and version == FORMAT_VERSION and claimed <= MAX_HEADER_BYTES
    return claimed if is_header else None


def decode_header(raw: bytes, *, trusted: bool = False) -> Header | None:
    """The header that `raw` is, all of it; None if it is torn, corrupt or of another version.

    `trusted` skips its checksum, where a checksum over all headers was verified already.
    """
    if len(raw) < MIN_HEADER_BYTES:
        return None
    magic, version, fingerprint_bytes, *fields = _FIXED.unpack_from(raw)
    if magic != MAGIC or version != FORMAT_VERSION:
        return None
    if len(raw) != MIN_HEADER_BYTES + fingerprint_bytes + 4 * fields[0]:
        return None
    if not trusted:
        (checksum,) = _CHECKSUM.unpack_from(raw, len(raw) - _CHECKSUM.size)
        if checksum != xxh3_64_intdigest(memoryview(raw)[: -_CHECKSUM.size]):
            return None
    return Header(raw, raw[_FIXED.size : _FIXED.size + fingerprint_bytes], *fields)
