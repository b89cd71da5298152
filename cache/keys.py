"""Content keys: what names the KV of a chunk of tokens, given all the tokens before it.

A key is a hash, and a hash alone never decides: whoever finds a record by its key compares the
parent and the token ids that the record stores (`Record.holds`).
"""

import struct
from collections.abc import Callable

import numpy as np
from attrs import field, frozen
from attrs.validators import and_, ge, instance_of, max_len
from xxhash import xxh3_128_digest

from agentrt.cache.node import TokenArray

FORMAT_VERSION = 2  # of keys, record headers and the index: other versions are never read
KEY_BYTES = 16
TOKEN_BYTES = 4

Digest = Callable[[bytes], bytes]  # bytes -> KEY_BYTES bytes; tests force collisions with it

MAX_TEXT = 4096  # characters: a header gives the length of a fingerprint 16 bits


@frozen(kw_only=True)
class Fingerprint:
    """All that KV depends on besides the tokens: two engines share KV only if theirs are equal.

    `namespace` keeps tenants apart, `layout` names the order of a payload's bytes, `arithmetic` the
    kernels and the machine, which round in their own way.
    """

    namespace: str = field(validator=and_(instance_of(str), max_len(MAX_TEXT)))
    model_digest: str = field(validator=and_(instance_of(str), max_len(MAX_TEXT)))
    layout: str = field(validator=and_(instance_of(str), max_len(MAX_TEXT)))
    dtype: str = field(validator=and_(instance_of(str), max_len(MAX_TEXT)))
    arithmetic: str = field(validator=and_(instance_of(str), max_len(MAX_TEXT)))
    token_bytes: int = field(validator=and_(instance_of(int), ge(1)))

    @property
    def _texts(self) -> tuple[str, ...]:
        return self.namespace, self.model_digest, self.layout, self.dtype, self.arithmetic

    def encode(self) -> bytes:
        """The same bytes for equal fingerprints only; their number is a multiple of 4."""
        parts = [struct.pack("<Q", self.token_bytes)]
        for text in self._texts:
            raw = text.encode()
            parts.append(struct.pack("<I", len(raw)) + raw)
        joined = b"".join(parts)
        return joined + bytes(-len(joined) % 4)

    @classmethod
    def decode(cls, encoded: bytes) -> "Fingerprint":
        """The inverse of `encode`."""
        (token_bytes,) = struct.unpack_from("<Q", encoded)
        position, texts = 8, []
        for _ in range(5):
            (num_bytes,) = struct.unpack_from("<I", encoded, position)
            position += 4
            texts.append(encoded[position : position + num_bytes].decode())
            position += num_bytes
        namespace, model_digest, layout, dtype, arithmetic = texts
        return cls(
            namespace=namespace,
            model_digest=model_digest,
            layout=layout,
            dtype=dtype,
            arithmetic=arithmetic,
            token_bytes=token_bytes,
        )


def root_key(fingerprint: Fingerprint, digest: Digest = xxh3_128_digest) -> bytes:
    """The parent key of a first chunk."""
    return digest(struct.pack("<I", FORMAT_VERSION) + fingerprint.encode())


def raw_tokens(token_ids: TokenArray) -> bytes:
    """Tokens as keys and records have them: TOKEN_BYTES each."""
    return np.ascontiguousarray(token_ids, dtype="<i4").tobytes()


def chunk_keys(
    token_ids: TokenArray, chunk_tokens: int, digest: Digest = xxh3_128_digest
) -> list[bytes]:
    """The chain of keys of the whole chunks of a log, the first one's parent being empty."""
    raw, num_bytes = raw_tokens(token_ids), TOKEN_BYTES * chunk_tokens
    keys, parent = [], b""
    for begin in range(0, len(raw) - num_bytes + 1, num_bytes):
        parent = digest(parent + raw[begin : begin + num_bytes])
        keys.append(parent)
    return keys


def chunk_key(parent: bytes, token_ids: TokenArray, digest: Digest = xxh3_128_digest) -> bytes:
    """The key of the chunk `token_ids` behind the chunk whose key is `parent`."""
    return digest(parent + raw_tokens(token_ids))
