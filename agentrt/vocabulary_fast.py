"""Vocabularies of the tokenizers library: tokenizer.json, and byte-level BPE inside GGUF files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from agentrt.errors import ModelUnsupported, WeightsInvalid
from agentrt.gguf_file import GgufFile
from agentrt.vocabulary import Vocabulary

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# What llama.cpp does for files that name no pre-tokenizer of their own.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_KNOWN = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")


class FastEncoder:
    """Encodes with two copies of one tokenizer, since whether it matches special tokens is a
    setting of the whole tokenizer: switching it for a call would show in other threads."""

    def __init__(self, backend: Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._special = backend
        self._text = copy.deepcopy(backend)
        self._text.encode_special_tokens = True

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See `Encoder.encode`."""
        backend = self._special if allow_special else self._text
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose decoder is byte-level or sentencepiece-like."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise WeightsInvalid(f"{path} is truncated or no tokenizer.json: {exc}") from exc
    return _vocabulary(path, backend)


def read_gguf_bpe(gguf: GgufFile) -> Vocabulary:
    """The byte-level BPE vocabulary inside a GGUF file.

    Raises ModelUnsupported for a pre-tokenizer that is not implemented.
    """
    tokens = gguf.require("tokenizer.ggml.tokens", list)
    types = gguf.require("tokenizer.ggml.token_type", list)
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens) or len(types) != len(tokens):
        raise WeightsInvalid(
            f"{gguf.path}: {len(tokens)} tokens, {len(ids)} different ones, {len(types)} types"
        )
    named = gguf.metadata.get("tokenizer.ggml.pre")
    pre = _ALIASES.get(str(named), named)
    if pre not in _KNOWN:
        raise ModelUnsupported(
            f"{gguf.path}: pre-tokenizer {named!r} is not implemented, {_KNOWN} are: "
            "use the model's Hugging Face folder, which has a tokenizer.json"
        )
    backend = Tokenizer(_bpe(gguf, ids, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()  # as its tokenizer.json; GGUF cannot say it
    for special in (True, False):
        wanted = _CONTROL if special else _USER_DEFINED
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == wanted
            ]
        )
    return _vocabulary(gguf.path, backend)


def _bpe(gguf: GgufFile, ids: dict[str, int], *, ignore_merges: bool) -> BPE:
    merges = [tuple(merge.split(" ")) for merge in gguf.require("tokenizer.ggml.merges", list)]
    try:
        return BPE(vocab=ids, merges=merges, ignore_merges=ignore_merges)
    except Exception as exc:  # the library raises bare Exception
        raise WeightsInvalid(f"{gguf.path}: tokenizer.ggml.merges is corrupt: {exc}") from exc


def _pre_tokenizer(pre: str) -> Any:
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = {"llama-bpe": (_LLAMA3,), "qwen2": (_QWEN2,), "default": _DEFAULT}[pre]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def _vocabulary(path: Path, backend: Tokenizer) -> Vocabulary:
    decoder = json.loads(backend.to_str())["decoder"]
    steps = _decoder_steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        pieces, strips = _pieces(backend, _from_byte_level), False
    elif kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        pieces, strips = _pieces(backend, _from_sentencepiece), "Strip" in kinds
    else:
        raise ModelUnsupported(
            f"{path}: decoder {kinds} is not implemented, byte-level and byte-fallback ones are"
        )
    added = backend.get_added_tokens_decoder()
    return Vocabulary(
        encoder=FastEncoder(backend),
        pieces=pieces,
        special_tokens=MappingProxyType(
            {token.content: index for index, token in sorted(added.items()) if token.special}
        ),
        strips_leading_space=strips,
        backend=backend,
    )


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    steps: list[Mapping[str, Any]] = decoder.get("decoders", [decoder])
    return steps


def _pieces(backend: Tokenizer, to_bytes: Any) -> tuple[bytes, ...]:
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        pieces[index] = to_bytes(token)
    for index, added in backend.get_added_tokens_decoder().items():
        pieces[index] = added.content.encode("utf-8")  # matched in the text as it stands
    return tuple(pieces)


def _byte_alphabet() -> dict[int, int]:
    """Code point to byte, of the printable alphabet in which byte-level BPE writes its tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
_ALPHABET_CHARACTERS = frozenset(map(chr, _ALPHABET))


def _from_byte_level(token: str) -> bytes:
    if _ALPHABET_CHARACTERS.issuperset(token):
        return token.translate(_ALPHABET).encode("latin-1")
    return token.encode("utf-8")  # as the library's own decoder does with foreign entries


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode("utf-8")
