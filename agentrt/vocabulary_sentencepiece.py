"""Vocabularies of the sentencepiece library: tokenizer.model, and "llama" tokenizers inside GGUF.

A GGUF file holds the pieces, scores and types of the model it came from. They are put back into a
model for sentencepiece itself, so that the same code cuts the text: rebuilt merges would be close,
but differ where scores tie. The few protobuf fields are written by hand; sentencepiece brings no
Python classes for them without the protobuf package.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sentencepiece import SentencePieceProcessor

from agentrt.errors import WeightsInvalid
from agentrt.gguf_file import GgufFile
from agentrt.model_folder import read_json_object
from agentrt.vocabulary import Vocabulary

_SPACE = "▁"
_BPE = 2


class SentencePieceEncoder:
    """Splits text on the given names first, then lets sentencepiece cut what lies between.

    Only text at the very start gets sentencepiece's leading space, as in transformers
    (`legacy=False`): after a special token the text goes on, it does not begin.
    """

    def __init__(self, model: bytes, special: Mapping[str, int], added: Mapping[str, int]) -> None:
        self._first = _processor(model)
        self._later = _processor(model + _message(3, _number(3, 0)))
        self._ids = {**special, **added}
        self._special = _splitter(self._ids)
        self._text = _splitter(added)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See `Encoder.encode`."""
        splitter = self._special if allow_special else self._text
        parts = splitter.split(text) if splitter is not None else [text]
        ids: list[int] = self._first.encode(parts[0]) if parts[0] else []
        for name, between in zip(parts[1::2], parts[2::2], strict=True):
            ids.append(self._ids[name])
            if between:
                ids += self._later.encode(between)
        return ids


def read_tokenizer_model(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.model, and of the added tokens that files beside it list."""
    return _vocabulary(path, path.read_bytes(), *_added_tokens(path.parent))


def read_gguf_sentencepiece(gguf: GgufFile) -> Vocabulary:
    """The "llama" vocabulary inside a GGUF file."""
    tokens = gguf.require("tokenizer.ggml.tokens", list)
    scores = gguf.require("tokenizer.ggml.scores", list)
    types = gguf.require("tokenizer.ggml.token_type", list)
    if not len(tokens) == len(scores) == len(types):
        raise WeightsInvalid(
            f"{gguf.path}: {len(tokens)} tokens, {len(scores)} scores, {len(types)} token types"
        )
    pieces = b"".join(
        _message(
            1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        )
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    prefix = int(gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))
    squeeze = int(gguf.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    trainer = _number(3, _BPE) + _number(4, len(tokens)) + _number(35, 1)  # 35: byte fallback
    normalizer = _message(1, b"identity") + _number(3, prefix) + _number(4, squeeze) + _number(5, 1)
    model = pieces + _message(2, trainer) + _message(3, normalizer)
    return _vocabulary(gguf.path, model, {}, {})


def _vocabulary(
    path: Path, model: bytes, special: Mapping[str, int], added: Mapping[str, int]
) -> Vocabulary:
    try:
        processor = _processor(model)
    except (RuntimeError, OSError) as exc:
        raise WeightsInvalid(f"{path} holds no sentencepiece model: {exc}") from exc
    num_pieces = processor.get_piece_size()
    control = {
        processor.id_to_piece(index): index
        for index in range(num_pieces)
        if processor.is_control(index) or processor.is_unknown(index)
    }
    special = {**control, **special}
    pieces = [_piece_bytes(processor, index) for index in range(num_pieces)]
    beyond = {index: name for name, index in {**special, **added}.items() if index >= num_pieces}
    pieces += [
        beyond.get(index, "").encode() for index in range(num_pieces, max(beyond, default=0) + 1)
    ]
    return Vocabulary(
        encoder=SentencePieceEncoder(model, special, added),
        pieces=tuple(pieces),
        special_tokens=MappingProxyType(special),
        strips_leading_space=processor.normalize("a").startswith(_SPACE),
    )


def _processor(model: bytes) -> Any:
    processor = SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    return processor


def _piece_bytes(processor: Any, index: int) -> bytes:
    piece: str = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, " ").encode()


def _added_tokens(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Special and other added tokens by name, from added_tokens.json and tokenizer_config.json."""
    special: dict[str, int] = {}
    added: dict[str, int] = read_json_object(folder / "added_tokens.json")
    config = read_json_object(folder / "tokenizer_config.json")
    for index, token in config.get("added_tokens_decoder", {}).items():
        (special if token.get("special") else added)[token["content"]] = int(index)
    return special, {name: index for name, index in added.items() if name not in special}


def _splitter(names: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of `names` at the leftmost place."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    # A second occurrence of a message field is merged into the first: that is how the encoder
    # switches one normaliser setting of a model that it does not parse.
    return _varint(field << 3 | 2) + _varint(len(content)) + content
