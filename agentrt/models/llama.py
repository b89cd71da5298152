"""The Llama family: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 (qkv bias), Qwen3 (qk-norm).

Pre-norm transformer with grouped-query attention, rotary embeddings and SwiGLU (Touvron et al.
2023). q, k, v are one matrix here, and so are gate and up: fewer, larger products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from attrs import define, frozen
from torch import Tensor

from agentrt.kernels import Geometry, Linear, Normal, Ops, Segment, Step, StepInputs
from agentrt.models.base import ModelSpec


@frozen(kw_only=True)
class Layer:
    """One block's weights, packed."""

    attention_norm: Tensor
    qkv: Linear
    head_norms: tuple[Tensor, Tensor] | None  # of queries and of keys
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this spec must hold, under its Hugging Face name."""
    hidden, dim = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for i in range(spec.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (spec.intermediate_size, hidden),
            "mlp.up_proj.weight": (spec.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, spec.intermediate_size),
        }
        if spec.qkv_bias:
            layer |= {f"self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
        if spec.qk_norm:
            layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


@define
class LlamaModel:
    """See `agentrt.models.base.Model`. Nothing changes after `build`."""

    spec: ModelSpec
    ops: Ops
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    geometry: Geometry

    @classmethod
    def build(
        cls, spec: ModelSpec, ops: Ops, tensors: Iterable[tuple[str, Tensor]], max_context: int
    ) -> LlamaModel:
        """Pack tensors as they come; each is let go once it is packed."""
        builder = _Builder(spec, ops)
        for name, tensor in tensors:
            builder.add(name, tensor)
        embedding, norm = (
            builder.parts["model.embed_tokens.weight"],
            builder.parts["model.norm.weight"],
        )
        head = ops.pack_linear(builder.parts.get("lm_head.weight", embedding), None)
        cos, sin = ops.pack_rotation(rotation_angles(spec, max_context), embedding)
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        geometry = Geometry(*heads, spec.norm_eps, cos, sin, spec.hidden_size)
        return cls(spec, ops, embedding, tuple(builder.layers), norm, head, geometry)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        segments: tuple[Segment, ...],
        kv: Tensor,
        output_rows: Tensor,
    ) -> Tensor:
        inputs = StepInputs(token_ids, positions, segments, kv, output_rows)
        return self.run(self.ops.plan_step(inputs, self.geometry))

    def run(self, step: Step) -> Tensor:
        """Logits of a step that is planned already [outputs, vocab], float32."""
        *layers, last = self.layers
        hidden, x = step.embed(self.embedding, self.layers[0].attention_norm)
        for index, layer in enumerate(layers):
            attended = step.attend(index, step.linear(x, layer.qkv), layer.head_norms)
            x = self._mlp(step, hidden, attended, layer, self.layers[index + 1].attention_norm)
        qkv = step.linear(x, last.qkv)
        left = step.attend_outputs(len(layers), qkv, last.head_norms, hidden)
        if left is None:
            return hidden.new_empty(0, self.spec.vocab_size, dtype=torch.float32)
        step, hidden, attended = left
        return step.logits(self._mlp(step, hidden, attended, last, self.norm), self.head)

    def _mlp(
        self, step: Step, hidden: Tensor, attended: Tensor, layer: Layer, norm: Tensor
    ) -> Normal:
        """The half of a block behind attention, and the norm that follows it."""
        x = step.add_norm(hidden, attended, layer.output, layer.mlp_norm)
        return step.add_norm(hidden, step.gate_up(x, layer.gate_up), layer.down, norm)


class _Builder:
    """Collects a layer's tensors until they are complete, then packs them."""

    def __init__(self, spec: ModelSpec, ops: Ops) -> None:
        self.spec = spec
        self.ops = ops
        self.parts: dict[str, Tensor] = {}
        self.layers: list[Layer] = []
        shapes = expected_shapes(spec)
        self.tensors_per_layer = sum(name.startswith("model.layers.0.") for name in shapes)

    def add(self, name: str, tensor: Tensor) -> None:
        self.parts[name] = tensor
        prefix = f"model.layers.{len(self.layers)}."
        if sum(key.startswith(prefix) for key in self.parts) == self.tensors_per_layer:
            parts = {key: self.parts.pop(key) for key in list(self.parts) if key.startswith(prefix)}
            self.layers.append(self._pack({k.removeprefix(prefix): t for k, t in parts.items()}))

    def _pack(self, parts: Mapping[str, Tensor]) -> Layer:
        pack: Callable[[Tensor, Tensor | None], Linear] = self.ops.pack_linear
        qkv = torch.cat([parts[f"self_attn.{n}_proj.weight"] for n in "qkv"])
        bias = None
        if self.spec.qkv_bias:
            bias = torch.cat([parts[f"self_attn.{n}_proj.bias"] for n in "qkv"])
        gate_up = torch.cat([parts["mlp.gate_proj.weight"], parts["mlp.up_proj.weight"]])
        return Layer(
            attention_norm=parts["input_layernorm.weight"],
            qkv=pack(qkv, bias),
            head_norms=(parts["self_attn.q_norm.weight"], parts["self_attn.k_norm.weight"])
            if self.spec.qk_norm
            else None,
            output=pack(parts["self_attn.o_proj.weight"], None),
            mlp_norm=parts["post_attention_layernorm.weight"],
            gate_up=pack(gate_up, None),
            down=pack(parts["mlp.down_proj.weight"], None),
        )


def rotation_angles(spec: ModelSpec, max_context: int) -> Tensor:
    """The angles [max_context, head_dim / 2] of the rotary embedding."""
    inverse = torch.tensor(spec.rope.inverse_frequencies(spec.head_dim), dtype=torch.float32)
    return torch.arange(max_context, dtype=torch.float32)[:, None] * inverse
