"""A GGUF file, mapped: its metadata, and the bytes of its tensors.

The gguf library has a reader, but it makes a numpy array of every vocabulary entry (3.5 s for the
98 MB default model, against 0.1 s here) and takes offsets and counts from the file on trust.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from attrs import frozen
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from agentrt.errors import ModelNotFound, ModelUnsupported, WeightsInvalid

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT_BYTES = 32
_STRING = 8
_ARRAY = 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]


@frozen
class GgufTensor:
    """Where one tensor lies. `shape` has the slowest dimension first, as torch has it."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


class GgufFile:
    """An open GGUF file. Nothing is read through the mapping before its bounds are checked.

    Raises ModelNotFound where there is no file, WeightsInvalid where it is truncated or corrupt,
    ModelUnsupported for a version or tensor type that is not implemented.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            if self.size_bytes < len(MAGIC):
                raise WeightsInvalid(f"{self.path} is no GGUF file: it has {self.size_bytes} bytes")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(self.path, self._map)
            self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
            self.tensors: Mapping[str, GgufTensor] = MappingProxyType(header.tensors)
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, which prefixes the model's own keys."""
        return str(self.require("general.architecture", str))

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The metadata value of `key`. Raises WeightsInvalid if it is absent or of another type."""
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            found = "is absent" if value is None else f"is a {type(value).__name__}"
            raise WeightsInvalid(f"{self.path}: metadata key {key!r} {found}")
        return value

    def read(self, tensor: GgufTensor) -> memoryview:
        """The tensor's bytes as stored. Release the view before the file is closed."""
        return self.read_range(tensor.offset_bytes, tensor.num_bytes)

    def read_range(self, offset_bytes: int, num_bytes: int) -> memoryview:
        """Bytes of the file, as a view of the mapping."""
        # A page of a mapping past the end of a file that shrank since is a SIGBUS, not an error.
        now_bytes = os.fstat(self._file.fileno()).st_size
        if not 0 <= offset_bytes <= offset_bytes + num_bytes <= min(self.size_bytes, now_bytes):
            raise WeightsInvalid(
                f"{self.path}: {num_bytes} bytes at {offset_bytes} are wanted, but the file, "
                f"opened with {self.size_bytes} bytes, has {now_bytes}"
            )
        return memoryview(self._map)[offset_bytes : offset_bytes + num_bytes]

    def close(self) -> None:
        """Unmap and close the file; a second call does nothing."""
        if hasattr(self, "_map"):
            self._map.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as exc:
        raise ModelNotFound(f"cannot read {path}: {exc.strerror or exc}") from exc


class _Header:
    """Parses the front of a GGUF file into `metadata` and `tensors`."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size_bytes = len(data)
        self._at = 0
        num_tensors, num_keys = self._counts()
        self.metadata: dict[str, Any] = dict(self._unique(self._keys(num_keys)))
        infos = list(self._tensor_infos(num_tensors))
        start_bytes = self._data_start()
        self.tensors = dict(self._unique(self._placed(infos, start_bytes)))

    def _fail(self, what: str) -> WeightsInvalid:
        return WeightsInvalid(
            f"{self._path} is truncated or corrupt: {what} (file of {self._size_bytes} bytes)"
        )

    def _take(self, num_bytes: int, what: str) -> int:
        """Move past `num_bytes` and return where they begin."""
        start = self._at
        if num_bytes > self._size_bytes - start:
            raise self._fail(f"{what} at byte {start} needs {num_bytes} bytes more than remain")
        self._at = start + num_bytes
        return start

    def _scalar(self, code: struct.Struct, what: str) -> Any:
        return code.unpack_from(self._data, self._take(code.size, what))[0]

    def _string(self, what: str) -> str:
        start = self._take(self._scalar(_U64, what), what)
        raw = self._data[start : self._at]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self._fail(f"{what} at byte {start} is not UTF-8") from exc

    def _counts(self) -> tuple[int, int]:
        magic = self._data[: len(MAGIC)]
        if magic != MAGIC:
            raise WeightsInvalid(
                f"{self._path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}"
            )
        self._take(len(MAGIC), "magic")
        version = self._scalar(_U32, "version")
        if version not in _VERSIONS:
            # A big-endian file shows as version 3 << 24.
            raise ModelUnsupported(
                f"{self._path}: GGUF version {version} is not implemented, {_VERSIONS} are "
                "(little-endian): convert the model again"
            )
        return self._scalar(_U64, "tensor count"), self._scalar(_U64, "key count")

    def _unique(self, items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for name, value in items:
            if name in seen:
                raise self._fail(f"{name!r} appears twice")
            seen.add(name)
            yield name, value

    def _keys(self, count: int) -> Iterator[tuple[str, Any]]:
        for index in range(count):
            key = self._string(f"metadata key {index}")
            yield key, self._value(self._scalar(_U32, f"type of {key!r}"), f"value of {key!r}")

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise self._fail(f"{what} has unknown type {kind}")
        return self._scalar(_SCALARS[kind], what)

    def _array(self, what: str) -> list[Any]:
        kind = self._scalar(_U32, what)
        count = self._scalar(_U64, what)
        if kind == _STRING:
            if count > (self._size_bytes - self._at) // _U64.size:
                raise self._fail(f"{what} claims {count} strings")
            return [self._string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._fail(f"{what} is an array of type {kind}")
        code = _SCALARS[kind]
        start = self._take(count * code.size, what)
        return [value for (value,) in code.iter_unpack(self._data[start : self._at])]

    def _tensor_infos(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for index in range(count):
            name = self._string(f"name of tensor {index}")
            what = f"tensor {name!r}"
            num_dimensions = self._scalar(_U32, what)
            if not 0 < num_dimensions <= _MAX_DIMENSIONS:
                raise self._fail(f"{what} has {num_dimensions} dimensions")
            shape = tuple(self._scalar(_U64, what) for _ in range(num_dimensions))[::-1]
            yield name, shape, self._scalar(_U32, what), self._scalar(_U64, what)

    def _data_start(self) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment is {alignment!r}, not a power of two")
        return -(-self._at // alignment) * alignment

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start_bytes: int
    ) -> Iterator[tuple[str, GgufTensor]]:
        for name, shape, kind, offset in infos:
            tensor_type = _tensor_type(self._path, name, kind)
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
            if 0 in shape or shape[-1] % block:
                raise self._fail(f"tensor {name!r} of {tensor_type.name} has shape {shape}")
            num_bytes = prod(shape) // block * block_bytes
            begin = start_bytes + offset
            if begin + num_bytes > self._size_bytes:
                raise self._fail(f"tensor {name!r} lies at bytes {begin} to {begin + num_bytes}")
            yield name, GgufTensor(name, tensor_type, shape, begin, num_bytes)


def _tensor_type(path: Path, name: str, kind: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(kind)
    except ValueError as exc:
        raise ModelUnsupported(
            f"{path}: tensor {name!r} has the unknown type number {kind}"
        ) from exc
