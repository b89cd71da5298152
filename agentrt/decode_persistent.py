"""A decode step of one row as a single launch, for a model and the memory of its runner."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from agentrt.errors import ConfigError
from agentrt.kernels.cuda_products import CudaLinear
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


def persistent_step(graphs: DecodeGraphs, grid: PersistentGrid | None = None) -> PersistentStep:
    """The step of a runner's graphs that has one row, on the same memory.

    Raises ConfigError on a device or a shape that it is not made for.
    """
    model, inputs, device = graphs.model, graphs.inputs, graphs.kv.device
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
    weights = persistent_weights(model, device)
    return PersistentStep(
        weights=weights,
        geometry=model.geometry,
        inputs=PersistentInputs(
            ring=inputs.ring,
            step=inputs.step,
            flat=inputs.flat,
            **{
                name: inputs.get(name, 1)
                for name in ("token_ids", "slots", "positions", "seeds", "temperatures")
            },
            starts=inputs.starts(1),
            place=inputs.outbox_at,
            tables=graphs.tables,
            last_tokens=graphs.last_tokens,
            outbox=inputs.outbox,
        ),
        kv=graphs.kv,
        work=graphs.scratch.decode,
        sampling=graphs.scratch.sample,
        memory=PersistentMemory.allocate(model.geometry, weights, device),
        grid=grid or PersistentGrid.choose(device, model.geometry.head_dim),
    )


def capture_step(device: StepDevice, step: PersistentStep) -> Captured:
    """The step as a graph of one launch; where a driver refuses to record such a launch, which the
    log then tells, launched anew each time."""
    try:
        return device.capture(step.compute)
    except RuntimeError as exc:
        logger.warning("a cooperative launch cannot be captured, so it is launched: %s", exc)

    def launch() -> None:
        step.compute()

    return Captured(launch, step.memory.logits)


def persistent_weights(model: LlamaModel, device: torch.device) -> PersistentWeights:
    """The model's weights as the kernel finds them."""
    spec = model.spec
    return PersistentWeights(
        embedding=model.embedding,
        addresses=table_of_addresses([_tensors(layer) for layer in model.layers], device),
        final_norm=model.norm,
        head=cast(CudaLinear, model.head),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        qkv_bias=spec.qkv_bias,
        head_norms=spec.qk_norm,
    )


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
