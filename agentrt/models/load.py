"""From a checkpoint, or a config.json alone, to a model on its device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attrs import evolve, frozen
from torch import Tensor

from agentrt.config import EngineConfig
from agentrt.errors import ConfigError, ModelNotFound, WeightsInvalid
from agentrt.kernels.dispatch import Compute, choose_compute
from agentrt.kernels.kv_layout import PlainLayout
from agentrt.models.base import ModelSpec, read_spec
from agentrt.models.kv_scales import digest_of, largest_kv
from agentrt.models.llama import LlamaModel, expected_shapes
from agentrt.weights import load_tensors, open_checkpoint

Progress = Callable[[int, int], None]


@frozen
class LoadedModel:
    """A model, how it computes, and the digest of its weights (if random, of its config)."""

    model: LlamaModel
    compute: Compute
    digest: str


def load_model(path: Path, config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Load and pack the weights, tensor by tensor. Blocks for seconds: call it in a thread.

    Raises ModelUnsupported, WeightsInvalid or ConfigError, naming what is wrong.
    """
    if config.kv_dtype == "fp8" and config.disk_kv_dtype == "int8":
        raise ConfigError(
            "disk_kv_dtype='int8' would pack what kv_dtype='fp8' keeps in 8 bits already: leave it "
            "at 'same'"
        )
    loaded = _random_model(path, config) if config.random_weights else _load(path, config, progress)
    return narrow_kv(loaded) if config.kv_dtype == "fp8" else loaded


def _load(path: Path, config: EngineConfig, progress: Progress | None) -> LoadedModel:
    with open_checkpoint(path) as checkpoint:
        spec = read_spec(checkpoint.config)
        compute = _compute(config, checkpoint.is_quantised)
        tensors = load_tensors(checkpoint, expected_shapes(spec), _load_dtype(compute), progress)
        on_device = ((name, tensor.to(compute.device)) for name, tensor in tensors)
        model = _build(spec, compute, config, on_device)
        return LoadedModel(model, compute, checkpoint.digest)


def narrow_kv(loaded: LoadedModel) -> LoadedModel:
    """The same model with a KV pool of 8 bits."""
    from agentrt.kernels.cuda import CudaOps  # loads Triton, which the CPU path does without
    from agentrt.kernels.narrow import KV_DTYPE, power_scales

    compute = loaded.compute
    assert isinstance(compute.ops, CudaOps)
    scales = power_scales(largest_kv(loaded.model, compute.dtype))
    ops = evolve(compute.ops, kv_scales=scales)
    layout = PlainLayout(f"plain, scales {digest_of(scales)}")
    compute = evolve(compute, ops=ops, dtype=KV_DTYPE, kv_layout=layout)
    return evolve(loaded, model=evolve(loaded.model, ops=ops), compute=compute)


def _compute(config: EngineConfig, is_quantised: bool) -> Compute:
    return choose_compute(
        device=config.device,
        dtype=config.dtype,
        weights=config.weights,
        deterministic=config.deterministic,
        is_quantised=is_quantised,
        cache_dir=config.cache_dir,
        long_prefill=config.long_prefill,
        decode_launch=config.decode_launch,
        kv_dtype=config.kv_dtype,
    )


def _load_dtype(compute: Compute) -> torch.dtype:
    return torch.float32 if compute.weights == "int8" else compute.dtype


@torch.inference_mode()
def _build(
    spec: ModelSpec,
    compute: Compute,
    config: EngineConfig,
    tensors: Iterator[tuple[str, Tensor]],
) -> LlamaModel:
    context = min(config.max_context_tokens or spec.max_context_tokens, spec.max_context_tokens)
    return LlamaModel.build(spec, compute.ops, tensors, context)


def _random_model(path: Path, config: EngineConfig) -> LoadedModel:
    file = path / "config.json"
    if not file.is_file():
        raise ModelNotFound(f"random_weights needs a folder with config.json: {file} is not there")
    try:
        values = json.loads(file.read_text())
    except ValueError as exc:
        raise WeightsInvalid(f"{file} is not JSON: {exc}") from exc
    spec = read_spec(values)
    compute = _compute(config, is_quantised=False)
    generator = torch.Generator(device=compute.device).manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected_shapes(spec).items():
            tensor = torch.empty(shape, dtype=_load_dtype(compute), device=compute.device)
            scale = 0.02 if len(shape) > 1 else 0.0
            yield name, tensor.normal_(0, scale, generator=generator) if scale else tensor.fill_(1)

    digest = f"random-{hashlib.sha256(file.read_bytes()).hexdigest()}"
    return LoadedModel(_build(spec, compute, config, tensors()), compute, digest)
