"""The CPU path in C (native*.c): one call a step method, threads of torch's own pool.

The kernels run in the OpenMP library that torch has loaded already (the linker finds it by its
name), so there is one pool of threads: two of them cost 1.8x (see `agentrt.step_thread`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from attrs import evolve, field, frozen
from numpy.typing import NDArray
from torch import Tensor

from agentrt.kernels import Geometry, Linear, StepInputs
from agentrt.kernels.host_memory import Arena
from agentrt.kernels.kv_layout import GROUP_TOKENS
from agentrt.kernels.native_build import NativeUnavailable, load_library

INT8_PANEL = 32  # outputs, as native_linear.c has it
FLOAT_PANEL = 64
WIDTH_UNIT = 64
SPLIT_TOKENS = 256  # as native_tile.h has it
SHORT_ROWS = 16
MOST_GROUP_HEADS = 192  # query heads of a KV head: the rows of a thread's memory there
MOST_HEAD_DIM = 1024
LARGEST = 127 * 256  # of an activation, in units of its row's peak
TINY = 1e-30

_LINEAR_FIELDS = ("inputs", "outputs", "weights", "scale", "bias")
_SEGMENT_FIELDS = 4
_ITEM_FIELDS = 4


class _Linear(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64 if name in ("inputs", "outputs") else ctypes.c_void_p)
        for name in _LINEAR_FIELDS
    ]


_NUMBERS = (
    *("num_rows", "num_segments", "num_threads", "num_heads", "num_kv_heads"),
    *("head_dim", "hidden", "pool_blocks", "block_tokens", "is_int8", "is_bfloat16"),
    *("scratch_bytes", "num_items"),
)
_ADDRESSES = (
    *("token_ids", "positions", "cos", "sin", "kv", "segments", "block_ids"),
    *("items", "members", "first_partial", "partials", "scratch"),
)


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("norm_eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
    ]


@frozen
class Native:
    """The loaded library."""

    library: ctypes.CDLL
    build: str  # names what it was made of: sources, flags, compiler and processor

    @classmethod
    def load(cls, cache_dir: Path) -> Self:
        """Build (once) and load. Raises NativeUnavailable."""
        library, build = load_library(cache_dir)
        address, number = ctypes.c_void_p, ctypes.c_int64
        arguments: dict[str, list[Any]] = {
            "plan": [address, address],
            "embed": [address] * 5,
            "linear": [address, number, *[address] * 3],
            "attend": [address, number, *[address] * 5],
            "add_norm": [address] * 6,
            "gate_up": [address] * 5,
            "scratch_bytes": [address],
            "row_bytes": [number, number],
            "has_bfloat16": [],
            "has_int8": [],
            "abi": [],
        }
        returns = {"scratch_bytes", "row_bytes", "has_bfloat16", "has_int8", "abi"}
        for name, types in arguments.items():
            function = getattr(library, f"native_{name}")
            function.argtypes = types
            function.restype = number if name in returns else None
        if library.native_abi() != ctypes.sizeof(_Step):
            raise NativeUnavailable("the native kernels' Step is not the one of native.py")
        return cls(library, build)

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16 pairs: then the KV pool may hold them."""
        return bool(self.library.native_has_bfloat16())

    @property
    def has_int8(self) -> bool:
        """Whether int8 products are fast. They are exact everywhere."""
        return bool(self.library.native_has_int8())


@frozen
class NativeLinear:
    """A packed matrix, and the struct that points to it."""

    tensors: tuple[Tensor | None, ...]  # keeps the memory of `struct` alive
    struct: _Linear
    address: int = field(init=False)

    @address.default
    def _address(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def outputs(self) -> int:
        return int(self.struct.outputs)

    @classmethod
    def pack_int8(cls, weight: Tensor, bias: Tensor | None, arena: Arena) -> Self:
        """weight [out, in] rounded to int8 an output row (symmetric), as unsigned plus 128."""
        wide = weight.float()
        scale = wide.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
        whole = (wide / scale).round_().to(torch.int16).add_(128).to(torch.uint8)
        padded = _padded(whole, INT8_PANEL, WIDTH_UNIT)
        panels = padded.view(-1, 2, 16, padded.shape[1] // 4, 4)
        packed = arena.keep(panels.permute(0, 3, 1, 2, 4))
        return cls._of(weight, packed, _padded_row(scale[:, 0] / LARGEST, INT8_PANEL), bias)

    @classmethod
    def pack_float(cls, weight: Tensor, bias: Tensor | None, arena: Arena) -> Self:
        """weight [out, in] as panels of outputs, input after input."""
        padded = _padded(weight.float(), FLOAT_PANEL, 1)
        packed = arena.keep(padded.view(-1, FLOAT_PANEL, padded.shape[1]).transpose(1, 2))
        return cls._of(weight, packed, None, bias)

    @classmethod
    def _of(cls, weight: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None) -> Self:
        if bias is not None:
            bias = _padded_row(bias.float(), FLOAT_PANEL)
        outputs, inputs = weight.shape
        struct = _Linear(inputs, outputs, packed.data_ptr(), _pointer(scale), _pointer(bias))
        return cls((packed, scale, bias), struct)


@frozen
class NativeStep:
    """See `agentrt.kernels.Step`. Rows that only products read ("normal") are opaque bytes."""

    native: ctypes.CDLL
    struct: _Step
    address: int
    is_int8: bool
    output_rows: Tensor
    kept: tuple[object, ...]  # the memory that `struct` points to

    def embed(self, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.empty(self.struct.num_rows, self.struct.hidden)
        x = self._normal(self.struct.num_rows, self.struct.hidden)
        self.native.native_embed(
            self.address, table.data_ptr(), norm.data_ptr(), hidden.data_ptr(), x.data_ptr()
        )
        return hidden, x

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        packed = cast(NativeLinear, linear)
        out = torch.empty(len(x), packed.outputs)
        self.native.native_linear(
            self.address, len(x), x.data_ptr(), packed.address, out.data_ptr()
        )
        return out

    def attend(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        width = self.struct.num_heads * self.struct.head_dim
        out = torch.empty(len(qkv), width)
        x = self._normal(len(qkv), width) if self.is_int8 else None
        self._attend(layer, qkv, norms, out, x)
        return out if x is None else x

    def attend_outputs(
        self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, hidden: Tensor
    ) -> tuple[NativeStep, Tensor, Tensor] | None:
        outputs = self.output_rows
        if not len(outputs):
            self._attend(layer, qkv, norms, None, None)
            return None
        attended = self.attend(layer, qkv, norms)
        struct = _Step.from_buffer_copy(self.struct)
        struct.num_rows = len(outputs)
        step = evolve(self, struct=struct, address=ctypes.addressof(struct))
        return step, hidden[outputs], attended[outputs]

    def _attend(
        self,
        layer: int,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        out: Tensor | None,
        x: Tensor | None,
    ) -> None:
        """Append keys and values, and attend if there is an `out`."""
        query_norm, key_norm = norms or (None, None)
        self.native.native_attend(
            self.address,
            layer,
            qkv.data_ptr(),
            _pointer(query_norm),
            _pointer(key_norm),
            _pointer(out),
            _pointer(x),
        )

    def add_norm(self, hidden: Tensor, x: Tensor, linear: Linear, norm: Tensor) -> Tensor:
        out = self._normal(self.struct.num_rows, self.struct.hidden)
        self.native.native_add_norm(
            self.address,
            hidden.data_ptr(),
            x.data_ptr(),
            cast(NativeLinear, linear).address,
            norm.data_ptr(),
            out.data_ptr(),
        )
        return out

    def gate_up(self, x: Tensor, linear: Linear) -> Tensor:
        packed = cast(NativeLinear, linear)
        both = torch.empty(len(x), packed.outputs)
        out = self._normal(len(x), packed.outputs // 2)
        self.native.native_gate_up(
            self.address, x.data_ptr(), packed.address, both.data_ptr(), out.data_ptr()
        )
        return out

    def logits(self, x: Tensor, linear: Linear) -> Tensor:
        return self.linear(x, linear)

    def _normal(self, num_rows: int, width: int) -> Tensor:
        """Memory for rows that products read (see native_row_bytes)."""
        if not self.is_int8:
            return torch.empty(num_rows, width)
        row_bytes = self.native.native_row_bytes(width, True)
        return torch.empty(num_rows, row_bytes, dtype=torch.int8)


@frozen
class NativeOps:
    """See `agentrt.kernels.Ops`."""

    native: Native
    is_int8: bool
    arena: Arena = field(factory=Arena, eq=False, repr=False)

    @property
    def name(self) -> str:
        return "native-int8" if self.is_int8 else "native-float32"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        pack = NativeLinear.pack_int8 if self.is_int8 else NativeLinear.pack_float
        return pack(weight, bias, self.arena)

    def pack_rotation(self, angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return angles.cos().contiguous(), angles.sin().contiguous()

    def plan_step(self, inputs: StepInputs, geometry: Geometry) -> NativeStep:
        library = self.native.library
        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        segments, block_ids = _segment_table(inputs)
        most = min(SHORT_ROWS, max(MOST_GROUP_HEADS // (heads // kv_heads), 1))
        is_short = segments[:, 1] <= most
        if (is_short[1:] & ~is_short[:-1]).any():
            raise ValueError(f"segments of up to {most} rows must come first")
        if inputs.kv.shape[4] % GROUP_TOKENS:
            raise ValueError(f"blocks of a multiple of {GROUP_TOKENS} tokens are needed")
        if heads // kv_heads > MOST_GROUP_HEADS or dim > MOST_HEAD_DIM or dim % 2:
            raise ValueError(f"{heads} heads of {dim} over {kv_heads} KV heads are not implemented")
        num_rows = len(inputs.token_ids)
        short = segments[is_short]
        last_splits = (short[:, 1] + short[:, 2] - 1) // SPLIT_TOKENS + 1
        num_partials = int((short[:, 1] * last_splits).sum())
        partial_floats = heads * (-(-dim // 16) * 16 + 2)
        num_threads = torch.get_num_threads()
        items = np.empty((num_rows + num_partials, _ITEM_FIELDS), np.int64)
        members = np.empty(num_rows + num_partials, np.int32)
        first_partial = np.empty(num_rows, np.int64)
        partials = np.empty(max(num_partials, 1) * partial_floats, np.float32)
        struct = _Step(
            num_rows=num_rows,
            num_segments=len(segments),
            num_threads=num_threads,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            hidden=geometry.hidden_size,
            pool_blocks=inputs.kv.shape[2],
            block_tokens=inputs.kv.shape[4],
            is_int8=self.is_int8,
            is_bfloat16=inputs.kv.dtype == torch.bfloat16,
            norm_eps=geometry.norm_eps,
            token_ids=inputs.token_ids.data_ptr(),
            positions=inputs.positions.data_ptr(),
            cos=geometry.cos.data_ptr(),
            sin=geometry.sin.data_ptr(),
            kv=inputs.kv.data_ptr(),
            segments=segments.ctypes.data,
            block_ids=block_ids.ctypes.data,
            items=items.ctypes.data,
            members=members.ctypes.data,
            first_partial=first_partial.ctypes.data,
            partials=partials.ctypes.data,
        )
        address = ctypes.addressof(struct)
        struct.scratch_bytes = library.native_scratch_bytes(address)
        scratch = np.empty(num_threads * struct.scratch_bytes + 64, np.uint8)
        struct.scratch = -(-scratch.ctypes.data // 64) * 64
        next_split = np.empty(len(segments), np.int64)
        library.native_plan(address, next_split.ctypes.data)
        kept = (inputs, geometry, segments, block_ids, items, members, first_partial, partials)
        return NativeStep(
            library, struct, address, self.is_int8, inputs.output_rows, (*kept, scratch)
        )


def _segment_table(inputs: StepInputs) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Segments as rows of four numbers, and all their block ids, one after another."""
    counts = [len(segment.block_ids) for segment in inputs.segments]
    firsts = np.cumsum([0, *counts]).tolist()
    rows = [
        (segment.first_row, segment.num_rows, segment.start_position, first)
        for segment, first in zip(inputs.segments, firsts[:-1], strict=True)
    ]
    ids = [np.asarray(segment.block_ids, np.int32) for segment in inputs.segments]
    return np.array(rows, np.int64).reshape(-1, _SEGMENT_FIELDS), np.concatenate(ids)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _padded(matrix: Tensor, row_unit: int, column_unit: int) -> Tensor:
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -columns % column_unit, 0, -rows % row_unit))


def _padded_row(row: Tensor, unit: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, -len(row) % unit)).contiguous()
