"""From a checkpoint, or a config.json alone, to a model on its device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from agentrt.config import EngineConfig
from agentrt.errors import ModelNotFound, WeightsInvalid
from agentrt.kernels.dispatch import Compute, choose_compute
from agentrt.models.base import ModelSpec, read_spec
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

    Raises ModelUnsupported or WeightsInvalid, naming what is wrong.
    """
    if config.random_weights:
        return _random_model(path, config)
    with open_checkpoint(path) as checkpoint:
        spec = read_spec(checkpoint.config)
        compute = _compute(config, checkpoint.is_quantised)
        tensors = load_tensors(checkpoint, expected_shapes(spec), _load_dtype(compute), progress)
        on_device = ((name, tensor.to(compute.device)) for name, tensor in tensors)
        model = _build(spec, compute, config, on_device)
        return LoadedModel(model, compute, checkpoint.digest)


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
