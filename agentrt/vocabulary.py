"""What a tokenizer file comes down to: how text is cut into ids, and the bytes of every id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from attrs import field, frozen


class Encoder(Protocol):
    """Cuts text into token ids; safe to call from many threads at once."""

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Token ids of `text`; names of special tokens are plain text unless `allow_special`."""


@frozen(kw_only=True)
class Vocabulary:
    """`pieces[i]` are the bytes that token i stands for; ids that no token has stand for none.

    `strips_leading_space`: encoding put a space before the text, which decoding takes away again.
    `backend` is the `tokenizers.Tokenizer` that matches special tokens, where there is one.
    """

    encoder: Encoder
    pieces: tuple[bytes, ...] = field(repr=False)
    special_tokens: Mapping[str, int]
    strips_leading_space: bool = False
    backend: Any = field(default=None, repr=False)
