"""What the last bits of a result depend on: KV that one machine computed is another's only if these
are equal."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch

from agentrt.kernels import Ops
from agentrt.kernels.native import NativeOps


def arithmetic_of(ops: Ops, device: torch.device) -> str:
    """A text that differs where the same tokens may give other bits."""
    if isinstance(ops, NativeOps):
        return ops.native.build  # of sources, flags, compiler and processor
    parts = [f"torch {torch.__version__}", _sources_digest()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
        parts.append(f"deterministic={getattr(ops, 'deterministic', False)}")
    else:
        parts += [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return ", ".join(parts)


def _sources_digest() -> str:
    """Of this folder: a kernel that was changed sums in another order, perhaps."""
    hasher = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(source.read_bytes() + b"\0")
    return hasher.hexdigest()[:16]
