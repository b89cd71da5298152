"""Safetensors files: their headers, checked against their sizes, and the shards of a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from attrs import frozen

from agentrt.errors import ModelNotFound, ModelUnsupported, WeightsInvalid

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@frozen
class SafetensorsEntry:
    """Where one tensor lies, and in which file."""

    path: Path
    type: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


def read_entries(folder: Path) -> Mapping[str, SafetensorsEntry]:
    """The tensors of a folder's model.safetensors, or of its shards, by name.

    Raises ModelNotFound without such files, ModelUnsupported where only pickled weights are there,
    WeightsInvalid where a header, the index or a file's size is wrong.
    """
    index = folder / INDEX
    if index.is_file():
        return _sharded(index)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelUnsupported(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded: "
            "convert them with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise ModelNotFound(f"{folder} has neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of one file by name, checked against the file's size."""
    header, start_bytes, size_bytes = _raw_header(path)
    entries, ends = {}, [start_bytes]
    for name, info in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(path, name, info, start_bytes)
        ends.append(entry.offset_bytes + entry.num_bytes)
        entries[name] = entry
    if max(ends) != size_bytes:
        raise WeightsInvalid(
            f"{path} is truncated or corrupt: its tensors end at byte {max(ends)}, "
            f"the file has {size_bytes} bytes"
        )
    return entries


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else None
        if length is None or length > min(size_bytes - _LENGTH.size, _MAX_HEADER_BYTES):
            raise WeightsInvalid(
                f"{path} is truncated or no safetensors file: a header of {length} bytes is "
                f"claimed, the file has {size_bytes} bytes"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as exc:
        raise WeightsInvalid(f"{path}: the header of {length} bytes is no JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise WeightsInvalid(f"{path}: the header is a {type(header).__name__}, not an object")
    return header, _LENGTH.size + length, size_bytes


def _entry(path: Path, name: str, info: Any, start_bytes: int) -> SafetensorsEntry:
    try:
        kind, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        well_formed = all(isinstance(number, int) for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as exc:
        raise WeightsInvalid(f"{path}: tensor {name!r} has a malformed header entry") from exc
    if not well_formed or not 0 <= begin <= end or min(shape, default=0) < 0:
        raise WeightsInvalid(f"{path}: tensor {name!r} has offsets {begin!r} to {end!r}")
    # Other types are refused when the tensor is read, as nothing may want it.
    wanted = prod(shape) * ELEMENT_BYTES.get(kind, 0)
    if kind in ELEMENT_BYTES and end - begin != wanted:
        raise WeightsInvalid(
            f"{path}: tensor {name!r} of {kind} {shape} needs {wanted} bytes, has {end - begin}"
        )
    return SafetensorsEntry(path, kind, shape, start_bytes + begin, end - begin)


def _sharded(index: Path) -> dict[str, SafetensorsEntry]:
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsInvalid(f"{index} is no index: {type(exc).__name__}: {exc}") from exc
    entries: dict[str, SafetensorsEntry] = {}
    for shard in shards:
        # The index is data from outside: a shard is a file beside it, never a path elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsInvalid(f"{index} names the shard {shard!r}, which is no file name")
        if not (index.parent / shard).is_file():
            raise WeightsInvalid(f"{index} names {shard}, which is missing: fetch it again")
        found = read_header(index.parent / shard)
        entries |= {name: entry for name, entry in found.items() if names.get(name) == shard}
    if missing := sorted(names.keys() - entries.keys()):
        raise WeightsInvalid(
            f"{index} names {len(missing)} tensors that their shards lack: {missing[:8]}"
        )
    return entries
