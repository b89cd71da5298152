"""Checkpoints: the tensors of a safetensors folder or a GGUF file under Hugging Face names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import gguf
import numpy as np
import torch
import xxhash
from gguf.constants import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from agentrt.errors import ModelNotFound, ModelUnsupported, WeightsInvalid
from agentrt.gguf_file import GgufFile
from agentrt.gguf_model import MappedTensor, config_of, map_tensors
from agentrt.model_folder import read_json_object
from agentrt.safetensors_file import ELEMENT_BYTES, SafetensorsEntry, read_entries

Progress = Callable[[int, int], None]

_SAMPLE_BYTES = 64 * 1024
_QUANTISED = frozenset({"Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"})
_READABLE = _QUANTISED | {"F32", "F16", "BF16"}
_MAX_NAMES_SHOWN = 6


class Checkpoint(Protocol):
    """An open checkpoint. `tensor` may be called from any thread; close it when all is read."""

    @property
    def source(self) -> Path:
        """The folder or file that was opened."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or what the GGUF metadata says in the same keys."""

    @property
    def tensor_names(self) -> frozenset[str]:
        """The names of all tensors, in Hugging Face's words."""

    @property
    def is_quantised(self) -> bool:
        """Whether the file stores the layers' matrices in 8 bits or fewer."""

    @property
    def digest(self) -> str:
        """32 hex digits over the config and a sample of every tensor: tells checkpoints apart."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, dequantised and converted, in memory of its own."""

    def close(self) -> None:
        """Unmap the files; a second call does nothing."""

    def __enter__(self) -> Self:
        """Return the checkpoint itself."""

    def __exit__(self, *_: object) -> None:
        """Close it."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Map a folder in Hugging Face layout, or a GGUF file.

    Raises ModelNotFound, ModelUnsupported or WeightsInvalid, which say what to change.
    """
    source = Path(path)
    return SafetensorsCheckpoint(source) if source.is_dir() else GgufCheckpoint(source)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config alone, of a folder (weights need not be there) or of a GGUF file."""
    source = Path(path)
    if not source.is_dir():
        with GgufFile(source) as file:
            return config_of(file)
    if not (source / "config.json").is_file():
        raise ModelNotFound(f"{source} has no config.json")
    return read_json_object(source / "config.json")


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files."""

    is_quantised = False  # a folder that says otherwise is refused below

    def __init__(self, folder: Path) -> None:
        self.source = folder
        self.config = read_config(folder)
        if quantisation := self.config.get("quantization_config"):
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise ModelUnsupported(
                f"{folder}: weights quantised by {method!r} are not implemented: use the "
                "unquantised model and EngineConfig(weights=...), or a GGUF file"
            )
        self._entries = read_entries(folder)
        self._files: dict[Path, Any] = {}
        for path in sorted({entry.path for entry in self._entries.values()}):
            self._files[path] = _open_safetensors(path)
        self._sizes = {path: path.stat().st_size for path in self._files}
        self.tensor_names = frozenset(self._entries)

    @property
    def digest(self) -> str:
        """See `Checkpoint.digest`."""
        hasher = _config_hasher(self.config)
        for path in self._files:
            mine = sorted(name for name, entry in self._entries.items() if entry.path == path)
            with path.open("rb") as file:
                for name in mine:
                    entry = self._entries[name]
                    line = f"{name} {entry.type} {entry.shape} {entry.num_bytes}\n"
                    hasher.update(line.encode())
                    for offset, size in _sample_ranges(entry.offset_bytes, entry.num_bytes):
                        file.seek(offset)
                        hasher.update(file.read(size))
        return str(hasher.hexdigest())

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return self._entry(name).shape

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        entry = self._entry(name)
        if entry.type not in ELEMENT_BYTES:
            raise ModelUnsupported(
                f"{entry.path}: tensor {name!r} has type {entry.type}, "
                f"only {sorted(ELEMENT_BYTES)} are implemented"
            )
        if entry.path not in self._files:
            raise ValueError(f"the checkpoint {self.source} is closed")
        # A page of a mapping past the end of a file that shrank since is a SIGBUS, not an error.
        if (now_bytes := entry.path.stat().st_size) != self._sizes[entry.path]:
            raise WeightsInvalid(
                f"{entry.path} had {self._sizes[entry.path]} bytes when opened, has {now_bytes}"
            )
        mapped: torch.Tensor = self._files[entry.path].get_tensor(name)
        # A copy even where nothing is converted: a tensor that still views the mapping would change
        # with the file, and keep the mapping alive past close().
        return mapped.to(dtype, copy=True)

    def _entry(self, name: str) -> SafetensorsEntry:
        if name not in self._entries:
            raise WeightsInvalid(f"{self.source} has no tensor {name!r}")
        return self._entries[name]

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GgufCheckpoint:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self.source = path
        self._file = GgufFile(path)
        try:
            self.config = config_of(self._file)
            self._tensors = map_tensors(self._file, self.config)
        except BaseException:
            self._file.close()
            raise
        self.tensor_names = frozenset(self._tensors)

    @property
    def is_quantised(self) -> bool:
        """See `Checkpoint.is_quantised`."""
        return any(
            name.startswith("model.layers.") and mapped.tensor.type.name in _QUANTISED
            for name, mapped in self._tensors.items()
        )

    @property
    def digest(self) -> str:
        """See `Checkpoint.digest`."""
        hasher = _config_hasher(self.config)
        for name in sorted(self._tensors):
            tensor = self._tensors[name].tensor
            line = f"{name} {tensor.type.name} {tensor.shape} {tensor.num_bytes}\n"
            hasher.update(line.encode())
            for offset, size in _sample_ranges(tensor.offset_bytes, tensor.num_bytes):
                with self._file.read_range(offset, size) as sample:
                    hasher.update(sample)
        return str(hasher.hexdigest())

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return self._mapped(name).tensor.shape

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        mapped = self._mapped(name)
        tensor = mapped.tensor
        if tensor.type.name not in _READABLE:
            raise ModelUnsupported(
                f"{self.source}: tensor {tensor.name!r} has type {tensor.type.name}, only "
                f"{sorted(_READABLE)} are implemented: quantise the model to one of those"
            )
        with self._file.read(tensor) as raw:
            loaded = _dequantised(raw, tensor.type, tensor.shape)
        if mapped.interleaved_heads:
            loaded = _halves(loaded, mapped.interleaved_heads, tensor.name)
        return loaded.to(dtype)

    def _mapped(self, name: str) -> MappedTensor:
        if name not in self._tensors:
            raise WeightsInvalid(f"{self.source} has no tensor {name!r}")
        return self._tensors[name]

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each expected tensor in turn, after a check that the checkpoint holds those and no others.

    Raises WeightsInvalid, naming the tensors, before the first is read. `progress` is told how many
    are done, of how many.
    """
    _check_tensors(checkpoint, expected)
    for done, name in enumerate(expected, start=1):
        yield name, checkpoint.tensor(name, dtype)
        if progress is not None:
            progress(done, len(expected))


def _check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    names = checkpoint.tensor_names
    surplus = (name for name in names - expected.keys() if not _ignorable(name, checkpoint))
    problems = _listed("missing", expected.keys() - names) + _listed("unexpected", surplus)
    for name, shape in expected.items():
        if name in names and checkpoint.shape(name) != tuple(shape):
            problems.append(f"{name} has shape {checkpoint.shape(name)}, not {tuple(shape)}")
    if problems:
        more = len(problems) - _MAX_NAMES_SHOWN
        shown = problems[:_MAX_NAMES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise WeightsInvalid(f"{checkpoint.source} does not fit its config: " + "; ".join(shown))


def _ignorable(name: str, checkpoint: Checkpoint) -> bool:
    tied = name == "lm_head.weight" and bool(checkpoint.config.get("tie_word_embeddings"))
    return tied or name.endswith(".rotary_emb.inv_freq")  # old checkpoints saved that buffer


def _listed(what: str, names: Any) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    shown = ", ".join(found[:_MAX_NAMES_SHOWN])
    more = len(found) - _MAX_NAMES_SHOWN
    return [f"{what}: {shown}" + (f" and {more} more" if more > 0 else "")]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as exc:
        raise WeightsInvalid(f"{path} is truncated or corrupt: {exc}") from exc


def _config_hasher(config: Mapping[str, Any]) -> Any:
    return xxhash.xxh3_128(json.dumps(config, sort_keys=True, ensure_ascii=False).encode())


def _sample_ranges(offset_bytes: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """The first and the last 64 KiB of a tensor, without overlap, as (offset, size)."""
    head = min(num_bytes, _SAMPLE_BYTES)
    yield offset_bytes, head
    if tail := min(num_bytes - head, _SAMPLE_BYTES):
        yield offset_bytes + num_bytes - tail, tail


def _dequantised(
    raw: memoryview, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> torch.Tensor:
    if kind.name in ("F32", "F16", "BF16"):
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(plain).view(shape)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, len(raw) // (np.prod(shape[:-1], dtype=int)))
    # Scales of odd blocks can be infinite or NaN; the numbers are passed on as they are.
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(rows, kind)).view(shape)


def _halves(interleaved: torch.Tensor, num_heads: int, name: str) -> torch.Tensor:
    """Undo the row order of GGUF llama files: pairs (x0 y0 x1 y1) back to halves (x0 x1 y0 y1)."""
    num_rows = interleaved.shape[0]
    if num_rows % (2 * num_heads):
        raise WeightsInvalid(f"{name} has {num_rows} rows, not a multiple of 2 x {num_heads} heads")
    paired = interleaved.view(num_heads, num_rows // num_heads // 2, 2, *interleaved.shape[1:])
    return paired.transpose(1, 2).reshape(interleaved.shape)
