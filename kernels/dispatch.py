"""Which implementation of the operations an engine uses: decided once, when it starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from attrs import field, frozen

from agentrt.errors import ConfigError
from agentrt.kernels import Ops
from agentrt.kernels.cpu import CpuOps, LinearKind
from agentrt.kernels.kv_layout import GroupLayout, KvLayout, PlainLayout
from agentrt.kernels.native import Native, NativeOps
from agentrt.kernels.native_build import NativeUnavailable
from agentrt.kernels.reference import ReferenceOps

logger = logging.getLogger("agentrt")

DeviceName = Literal["cpu", "cuda"]


@frozen(kw_only=True)
class Compute:
    """The choice: a device, the dtype of KV, and the operations."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    weights: str  # "int8", "fp8", or the dtype's name
    kv_layout: KvLayout = field(factory=PlainLayout)
    note: str = ""  # why it is not the usual choice for this device, if so

    @property
    def kernels(self) -> str:
        """The operations' name, and the note's first line."""
        return f"{self.ops.name} ({self.note.splitlines()[0]})" if self.note else self.ops.name

    def free_device_bytes(self) -> int | None:
        """Free memory of a device that has its own."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None


def has_avx2() -> bool:
    """Whether the CPU has vectors of 8 floats (AVX2 with FMA), or of 16 (AVX-512)."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def has_fast_int8() -> bool:
    """Whether torch multiplies int8 exactly and fast (VNNI or AMX). On older CPUs it saturates.

    The native kernels do not: they say for themselves whether they are fast (`Native.has_int8`).
    """
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def has_fast_bfloat16() -> bool:
    """Whether the CPU has bf16 units. Without them bf16 products are slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_compute(
    *,
    device: str,
    dtype: str,
    weights: str,
    deterministic: bool,
    is_quantised: bool,
    cache_dir: Path,
    long_prefill: str = "auto",
    decode_launch: str = "graph",
    kv_dtype: str = "auto",
) -> Compute:
    """Resolve the "auto" settings on this machine. `cache_dir` keeps what is compiled for it.

    `weights="auto"` never drops precision that the file has: int8 serves files that are quantised
    already (`is_quantised`), where no dtype was asked for. Raises ConfigError, naming the setting.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if decode_launch == "persistent":
            _check_persistent(dtype, weights, deterministic)
        if kv_dtype == "fp8":
            _check_narrow_kv(dtype, deterministic, decode_launch)
        return _choose_cuda(dtype, weights, deterministic, long_prefill, decode_launch, kv_dtype)
    if kv_dtype == "fp8":
        raise ConfigError("kv_dtype='fp8' is not available on the CPU: leave it at 'auto'")
    if decode_launch != "graph":
        raise ConfigError(
            f"decode_launch={decode_launch!r} is a way to launch on CUDA: leave it at 'graph'"
        )
    if weights in ("int4", "fp8"):
        raise ConfigError(f"weights={weights!r} is not available on the CPU: use 'int8' or 'auto'")
    if weights == "int8" and dtype == "bfloat16":
        raise ConfigError("weights='int8' computes in float32: leave dtype at 'auto'")
    if weights == "int8" or (weights == "auto" and dtype == "auto" and is_quantised):
        return _choose_int8(cache_dir, deterministic, is_required=weights == "int8")
    if dtype == "bfloat16" and deterministic:
        raise ConfigError("deterministic=True on a CPU needs dtype='float32' or weights='int8'")
    if dtype == "bfloat16" or (dtype == "auto" and has_fast_bfloat16() and not deterministic):
        return _on_torch("dense", torch.bfloat16)
    native = _native_or_why(cache_dir, deterministic)
    if isinstance(native, str):
        return _on_torch("dense", torch.float32, native)
    return _on_native(native, is_int8=False)


def _choose_int8(cache_dir: Path, deterministic: bool, *, is_required: bool) -> Compute:
    """int8 by whoever multiplies it fast here. Where nobody does: float32, or ConfigError."""
    native = _native_or_why(cache_dir, deterministic)
    if isinstance(native, Native):
        has_int8, why = native.has_int8, "this processor has AVX-512 without it"
    else:
        has_int8, why = has_fast_int8(), f"the native CPU kernels do with AVX2, but: {native}"
    if is_required and not has_int8:
        raise ConfigError(f"weights='int8' needs VNNI or AMX ({why}): use weights='auto'")
    if isinstance(native, str):
        return _on_torch("int8" if has_int8 else "dense", torch.float32, native)
    return _on_native(native, is_int8=has_int8)


def _native_or_why(cache_dir: Path, deterministic: bool) -> Native | str:
    """The native kernels, or why torch's serve; those never where bits were promised."""
    try:
        return load_native(cache_dir)
    except NativeUnavailable as exc:
        if deterministic:
            raise ConfigError(f"deterministic=True needs the native CPU kernels: {exc}") from exc
        logger.warning("the native CPU kernels are not in use: %s", exc)
        return str(exc)


def _on_native(native: Native, *, is_int8: bool) -> Compute:
    # bfloat16 KV moves SmolLM2's output no farther than int8 weights do alone (mean KL 0.0042).
    narrow = is_int8 and native.has_bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    return Compute(
        device=torch.device("cpu"),
        dtype=dtype,
        ops=NativeOps(native, is_int8),
        weights="int8" if is_int8 else "float32",
        kv_layout=GroupLayout(dtype.itemsize),
    )


def load_native(cache_dir: Path) -> Native:
    """The native kernels, built if need be. Raises NativeUnavailable.

    Their vectors are as wide as AVX-512's or AVX2's. Where the processor's are narrower gcc takes
    them apart: compiled so for AVX2, a prefill of 2,048 tokens in float32 took 70 s.
    """
    if not has_avx2():
        raise NativeUnavailable("the processor has no AVX2, without which they are slow")
    return Native.load(cache_dir)


def _on_torch(kind: LinearKind, dtype: torch.dtype, note: str = "") -> Compute:
    return Compute(
        device=torch.device("cpu"),
        dtype=dtype,
        ops=CpuOps(kind),
        weights="int8" if kind == "int8" else str(dtype).removeprefix("torch."),
        note=note,
    )


def _check_persistent(dtype: str, weights: str, deterministic: bool) -> None:
    """Raise ConfigError on what the decode step of one launch does not serve."""
    for is_wrong, name in (
        (dtype == "float32", "dtype='float32'"),
        (weights == "fp8", "weights='fp8'"),
        (deterministic, "deterministic=True"),  # its sums are in another order than the batch's
    ):
        if is_wrong:
            raise ConfigError(
                f"decode_launch='persistent' cannot be had with {name}: use decode_launch='graph'"
            )


def _check_narrow_kv(dtype: str, deterministic: bool, decode_launch: str) -> None:
    """Raise ConfigError on what reads no keys and values of 8 bits."""
    for is_wrong, name in (
        (dtype == "float32", "dtype='float32', which runs on plain torch"),
        (deterministic, "deterministic=True, which has attention kernels of its own"),
        (decode_launch == "persistent", "decode_launch='persistent'"),
    ):
        if is_wrong:
            raise ConfigError(f"kv_dtype='fp8' cannot be had with {name}: leave one of them out")


def _choose_cuda(
    dtype: str,
    weights: str,
    deterministic: bool,
    long_prefill: str,
    decode_launch: str = "graph",
    kv_dtype: str = "auto",
) -> Compute:
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA device: use device='cpu'")
    if weights not in ("auto", "fp8"):
        raise ConfigError(f"weights={weights!r} is not available on CUDA: use 'auto' or 'fp8'")
    if deterministic and dtype == "float32":
        raise ConfigError(
            "deterministic=True with dtype='float32' is not available on CUDA, where float32 runs "
            "on plain torch and cuBLAS picks the order of its sums by the number of rows: leave "
            "dtype at 'auto' (bfloat16)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if dtype == "float32":
        if weights != "auto":
            raise ConfigError(
                "dtype='float32' on CUDA runs on plain torch: leave weights at 'auto'"
            )
        ops = ReferenceOps(device)
        return Compute(device=device, dtype=torch.float32, ops=ops, weights="float32")
    from agentrt.kernels.cuda import CudaOps  # loads Triton, which the CPU path does without

    is_fp8 = weights == "fp8"
    cudnn = long_prefill == "auto" and not deterministic
    triton_ops = CudaOps(device, fp8=is_fp8, deterministic=deterministic, cudnn=cudnn)
    name = "fp8" if is_fp8 else "bfloat16"
    note = "deterministic" if deterministic else ""
    if kv_dtype == "fp8":  # `models.load` finds the scales, once the weights are there
        note = "keys and values in fp8"
    if decode_launch == "persistent":
        note = "steps of at most 8 rows in one launch, more rows in graphs"
    return Compute(device=device, dtype=torch.bfloat16, ops=triton_ops, weights=name, note=note)
