"""Tokenizer: text to ids, ids to text, and text that arrives token by token."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from agentrt.errors import ModelNotFound, ModelUnsupported, WeightsInvalid
from agentrt.gguf_file import GgufFile
from agentrt.gguf_model import token_ids_of
from agentrt.model_folder import read_json_object
from agentrt.vocabulary import Vocabulary
from agentrt.vocabulary_fast import read_gguf_bpe, read_tokenizer_json
from agentrt.vocabulary_sentencepiece import read_gguf_sentencepiece, read_tokenizer_model


class IncrementalDecoder:
    """Text of ids that arrive in parts: all pushes and the flush together are `decode(all ids)`.

    Holds back the bytes of an unfinished character, nothing else.
    """

    def __init__(self, pieces: Sequence[bytes], *, strips_leading_space: bool) -> None:
        self._pieces = pieces
        self._at_start = strips_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make certain, after what was pushed before."""
        pieces = self._pieces
        raw = b"".join([pieces[index] for index in ids if 0 <= index < len(pieces)])
        if self._at_start and raw:
            self._at_start = False
            raw = raw.removeprefix(b" ")
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What the held-back bytes stand for: U+FFFD where a character was never finished."""
        return self._utf8.decode(b"", final=True)


@frozen(kw_only=True)
class Tokenizer:
    """A model's tokenizer. All methods may be called from any thread."""

    _vocabulary: Vocabulary = field(repr=False)
    eos_token_ids: frozenset[int]
    bos_token_id: int | None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model's embedding may have further, unused rows."""
        return len(self._vocabulary.pieces)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that plain text never encodes to, by their names."""
        return self._vocabulary.special_tokens

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` behind this one, or None. Do not change its settings."""
        return self._vocabulary.backend

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, without a bos token.

        Names of special tokens are plain text, unless `allow_special`: only pass text that no user
        or tool wrote with it.
        """
        return self._vocabulary.encoder.encode(text, allow_special=allow_special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by their names, invalid UTF-8 as U+FFFD."""
        decoder = self.stream()
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token stands for; none for an id that no token has."""
        pieces = self._vocabulary.pieces
        return pieces[index] if 0 <= index < len(pieces) else b""

    def stream(self) -> IncrementalDecoder:
        """A decoder for ids that arrive in parts."""
        return IncrementalDecoder(
            self._vocabulary.pieces, strips_leading_space=self._vocabulary.strips_leading_space
        )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json or tokenizer.model) or of a GGUF file.

    Raises ModelNotFound, ModelUnsupported or WeightsInvalid, which say what to change.
    """
    source = Path(path)
    return _from_folder(source) if source.is_dir() else _from_gguf(source)


def _from_gguf(path: Path) -> Tokenizer:
    readers = {"gpt2": read_gguf_bpe, "llama": read_gguf_sentencepiece}
    with GgufFile(path) as gguf:
        kind = gguf.metadata.get("tokenizer.ggml.model")
        if kind not in readers:
            raise ModelUnsupported(
                f"{path}: tokenizer.ggml.model {kind!r} is not implemented, {sorted(readers)} are"
            )
        vocabulary, ids = readers[kind](gguf), token_ids_of(gguf)
    return Tokenizer(
        vocabulary=vocabulary,
        eos_token_ids=_id_set(path, ids.get("eos_token_id")),
        bos_token_id=ids.get("bos_token_id"),
    )


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        vocabulary = read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        vocabulary = read_tokenizer_model(folder / "tokenizer.model")
    else:
        raise ModelNotFound(f"{folder} has neither tokenizer.json nor tokenizer.model")
    own = read_json_object(folder / "tokenizer_config.json")
    model = read_json_object(folder / "config.json")
    generation = read_json_object(folder / "generation_config.json")
    # The generation config lists every end of a turn; the others often name the first alone.
    ends = (
        generation.get("eos_token_id"),
        model.get("eos_token_id"),
        _named("eos", own, vocabulary),
    )
    begin = _named("bos", own, vocabulary) if "bos_token" in own else model.get("bos_token_id")
    return Tokenizer(
        vocabulary=vocabulary,
        eos_token_ids=_id_set(folder, next((end for end in ends if end is not None), None)),
        bos_token_id=begin,
    )


def _named(which: str, config: Mapping[str, Any], vocabulary: Vocabulary) -> int | None:
    token = config.get(f"{which}_token")
    name = token.get("content") if isinstance(token, dict) else token
    return vocabulary.special_tokens.get(name) if isinstance(name, str) else None


def _id_set(source: Path, value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise WeightsInvalid(f"{source}: eos_token_id must be token ids, got {value!r}")
    return frozenset(ids)
