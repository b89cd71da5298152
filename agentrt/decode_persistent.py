"""Decode steps of at most 8 rows as single launches, for a model and the memory of its runner."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from agentrt.errors import ConfigError
from agentrt.kernels.cuda_products import CudaLinear
from agentrt.kernels.persistent_batch_step import MOST_ROWS, BatchGrid, BatchMemory, BatchStep
from agentrt.kernels.persistent_step import (
    PersistentGrid,
    PersistentInputs,
    PersistentMemory,
    PersistentStep,
    PersistentWeights,
    table_of_addresses,
)
from agentrt.models.llama import Layer, LlamaModel
from agentrt.step_device import Captured, StepDevice

if TYPE_CHECKING:
    from agentrt.decode_graph import DecodeGraphs

logger = logging.getLogger("agentrt")
OneLaunch = PersistentStep | BatchStep


def persistent_steps(graphs: DecodeGraphs, buckets: Iterable[int]) -> dict[int, OneLaunch]:
    """The steps of those buckets of a runner's graphs that are not too wide, on the same memory.

    Raises ConfigError on a device or a shape that they are not made for.
    """
    steps: dict[int, OneLaunch] = {}
    memory: BatchMemory | None = None
    for bucket in sorted(bucket for bucket in buckets if bucket <= MOST_ROWS):
        if bucket == 1:
            steps[1] = persistent_step(graphs)
        else:
            steps[bucket] = made = batch_step(graphs, bucket, memory=memory)
            memory = made.memory
    return steps


def persistent_step(graphs: DecodeGraphs, grid: PersistentGrid | None = None) -> PersistentStep:
    """The step that has one row.

    Raises ConfigError as `persistent_steps` does.
    """
    model, device = graphs.model, graphs.kv.device
    _check(model, device)
    weights = persistent_weights(model, device)
    return PersistentStep(
        weights=weights,
        geometry=model.geometry,
        inputs=_inputs(graphs, 1),
        kv=graphs.kv,
        work=graphs.scratch.decode,
        sampling=graphs.scratch.sample,
        memory=PersistentMemory.allocate(model.geometry, weights, device),
        grid=grid or PersistentGrid.choose(device, model.geometry.head_dim),
    )


def batch_step(
    graphs: DecodeGraphs,
    batch: int,
    grid: BatchGrid | None = None,
    memory: BatchMemory | None = None,
) -> BatchStep:
    """The step that has `batch` rows; `memory` is that of another one with the same grid.

    Raises ConfigError as `persistent_steps` does.
    """
    model, device = graphs.model, graphs.kv.device
    _check(model, device)
    weights, grid = persistent_weights(model, device), grid or BatchGrid.choose(device)
    return BatchStep(
        batch=batch,
        weights=weights,
        geometry=model.geometry,
        inputs=_inputs(graphs, batch),
        kv=graphs.kv,
        work=graphs.scratch.decode,
        sampling=graphs.scratch.sample,
        memory=memory or BatchMemory.allocate(model.geometry, weights, grid, device),
        grid=grid,
    )


def _check(model: LlamaModel, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"decode_launch='persistent' is made for compute capability 9.0, which {name} is "
            "below: use decode_launch='graph'"
        )
    if model.spec.intermediate_size % 2:  # two weights are read as one number
        raise ConfigError(
            f"decode_launch='persistent' wants an even intermediate_size, not "
            f"{model.spec.intermediate_size}: use decode_launch='graph'"
        )


def _inputs(graphs: DecodeGraphs, rows: int) -> PersistentInputs:
    inputs = graphs.inputs
    return PersistentInputs(
        ring=inputs.ring,
        step=inputs.step,
        flat=inputs.flat,
        **{
            name: inputs.get(name, rows)
            for name in ("token_ids", "slots", "positions", "seeds", "temperatures")
        },
        starts=inputs.starts(rows),
        place=inputs.outbox_at,
        tables=graphs.tables,
        last_tokens=graphs.last_tokens,
        outbox=inputs.outbox,
    )


def capture_step(device: StepDevice, step: OneLaunch) -> Captured:
    """The step as a graph of one launch; where a driver refuses to record such a launch, which the
    log then tells, launched anew each time."""
    try:
        return device.capture(step.compute)
    except RuntimeError as exc:
        logger.warning("a cooperative launch cannot be captured, so it is launched: %s", exc)

    def launch() -> None:
        step.compute()

    return Captured(launch, step.logits)


def persistent_weights(model: LlamaModel, device: torch.device) -> PersistentWeights:
    """The model's weights as the kernel finds them."""
    spec = model.spec
    return PersistentWeights(
        embedding=model.embedding,
        addresses=table_of_addresses(_layers(model), device),
        final_norm=model.norm,
        head=cast(CudaLinear, model.head),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        qkv_bias=spec.qkv_bias,
        head_norms=spec.qk_norm,
    )


def _layers(model: LlamaModel) -> list[dict[str, Tensor | None]]:
    """Each layer's tensors, and the norm of what comes after it."""
    following = [*(layer.attention_norm for layer in model.layers[1:]), model.norm]
    return [
        _tensors(layer) | {"next_norm": norm}
        for layer, norm in zip(model.layers, following, strict=True)
    ]


def _tensors(layer: Layer) -> dict[str, Tensor | None]:
    query_norm, key_norm = layer.head_norms or (None, None)
    found: dict[str, Tensor | None] = {
        "attention_norm": layer.attention_norm,
        "mlp_norm": layer.mlp_norm,
        "query_norm": query_norm,
        "key_norm": key_norm,
    }
    for name in ("qkv", "output", "gate_up", "down"):
        linear = cast(CudaLinear, getattr(layer, name))
        found |= {name: linear.weight, f"{name}_scales": linear.scales}
    return found | {"qkv_bias": cast(CudaLinear, layer.qkv).bias}
