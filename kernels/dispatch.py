"""Which implementation of the operations an engine uses: decided once, when it starts."""

from __future__ import annotations

from typing import Literal

import torch
from attrs import frozen

from agentrt.errors import ConfigError
from agentrt.kernels import Ops
from agentrt.kernels.cpu import CpuOps, LinearKind
from agentrt.kernels.reference import ReferenceOps

DeviceName = Literal["cpu", "cuda"]


@frozen(kw_only=True)
class Compute:
    """The choice: a device, the dtype of activations and KV, and the operations."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    weights: str  # "int8", "fp8", or the dtype's name

    def free_device_bytes(self) -> int | None:
        """Free memory of a device that has its own."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None


def has_fast_int8() -> bool:
    """Whether the CPU multiplies int8 exactly and fast (VNNI or AMX). Older ones saturate."""
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
    long_prefill: str = "triton",
) -> Compute:
    """Resolve the "auto" settings on this machine.

    `weights="auto"` never drops precision that the file has: int8 serves files that are quantised
    already (`is_quantised`), where no dtype was asked for. Raises ConfigError, naming the setting.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return _choose_cuda(dtype, weights, deterministic, long_prefill)
    if weights in ("int4", "fp8"):
        raise ConfigError(f"weights={weights!r} is not available on the CPU: use 'int8' or 'auto'")
    if weights == "int8" and dtype == "bfloat16":
        raise ConfigError("weights='int8' computes in float32: leave dtype at 'auto'")
    if weights == "int8" and not has_fast_int8():
        raise ConfigError("weights='int8' needs a CPU with VNNI or AMX: use weights='auto'")
    auto_int8 = weights == "auto" and dtype == "auto" and is_quantised and has_fast_int8()
    if weights == "int8" or auto_int8:
        return _on_cpu("int8", torch.float32)
    kind: LinearKind = "tiled" if deterministic else "dense"
    if dtype == "bfloat16" or (dtype == "auto" and has_fast_bfloat16()):
        return _on_cpu(kind, torch.bfloat16)
    return _on_cpu(kind, torch.float32)


def _on_cpu(kind: LinearKind, dtype: torch.dtype) -> Compute:
    name = "int8" if kind == "int8" else str(dtype).removeprefix("torch.")
    device = torch.device("cpu")
    return Compute(device=device, dtype=dtype, ops=CpuOps(kind), weights=name)


def _choose_cuda(dtype: str, weights: str, deterministic: bool, long_prefill: str) -> Compute:
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA device: use device='cpu'")
    if weights not in ("auto", "fp8"):
        raise ConfigError(f"weights={weights!r} is not available on CUDA: use 'auto' or 'fp8'")
    if deterministic:
        raise ConfigError(
            "deterministic=True is not available on CUDA: cuBLAS picks the order of its sums by "
            "the number of rows"
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
    triton_ops = CudaOps(device, fp8=is_fp8, cudnn=long_prefill == "cudnn")
    name = "fp8" if is_fp8 else "bfloat16"
    return Compute(device=device, dtype=torch.bfloat16, ops=triton_ops, weights=name)
