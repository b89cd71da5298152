"""The Llama family: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 (qkv bias), Qwen3 (qk-norm).

Pre-norm transformer with grouped-query attention, rotary embeddings and SwiGLU (Touvron et al.
2023). q, k, v are one matrix here, and so are gate and up: fewer, larger products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from attrs import define, frozen
from torch import Tensor

from agentrt.kernels import Linear, Ops, Segment
from agentrt.models.base import ModelSpec


@frozen(kw_only=True)
class Layer:
    """One block's weights, packed."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
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
    cos: Tensor  # [max_context, 1, dim]
    sin: Tensor  # the same; its first half carries the minus sign of the rotation

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
        cos, sin = rotation_tables(spec, max_context, embedding.device, embedding.dtype)
        return cls(spec, ops, embedding, tuple(builder.layers), norm, head, cos, sin)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        segments: tuple[Segment, ...],
        kv: Tensor,
        output_rows: Tensor,
    ) -> Tensor:
        hidden = self.embedding[token_ids]
        rotation = self.cos[positions], self.sin[positions]
        eps, ops = self.spec.norm_eps, self.ops
        plan = ops.plan_attention(segments, kv, self.spec.num_heads)
        for index, layer in enumerate(self.layers):
            x = ops.rms_norm(hidden, layer.attention_norm, eps)
            query, key_value = self._heads(layer, x, rotation)
            plan.append_kv(index, key_value)
            hidden += layer.output(plan.attend(index, query).flatten(1))
            x = ops.rms_norm(hidden, layer.mlp_norm, eps)
            hidden += layer.down(ops.silu_mul(layer.gate_up(x)))
        outputs = ops.rms_norm(hidden[output_rows], self.norm, eps)
        return self.head(outputs).float()

    def _heads(
        self, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Query [rows, heads, dim], and key with value [rows, 2, kv_heads, dim], rotated."""
        spec, ops = self.spec, self.ops
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        all_heads = layer.qkv(x).view(-1, heads + 2 * kv_heads, dim)
        query, key = all_heads[:, :heads], all_heads[:, heads : heads + kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            query.copy_(ops.rms_norm(query, layer.q_norm, spec.norm_eps))
            key.copy_(ops.rms_norm(key, layer.k_norm, spec.norm_eps))
        ops.rotate_(all_heads[:, : heads + kv_heads], *rotation)
        return query, all_heads[:, heads:].view(-1, 2, kv_heads, dim)


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
            q_norm=parts.get("self_attn.q_norm.weight"),
            k_norm=parts.get("self_attn.k_norm.weight"),
            output=pack(parts["self_attn.o_proj.weight"], None),
            mlp_norm=parts["post_attention_layernorm.weight"],
            gate_up=pack(gate_up, None),
            down=pack(parts["mlp.down_proj.weight"], None),
        )


def rotation_tables(
    spec: ModelSpec, max_context: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin [max_context, 1, head_dim] of the half-split rotary embedding."""
    inverse = torch.tensor(spec.rope.inverse_frequencies(spec.head_dim), dtype=torch.float32)
    angles = torch.arange(max_context, dtype=torch.float32)[:, None] * inverse
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return cos[:, None].to(device, dtype), sin[:, None].to(device, dtype)
