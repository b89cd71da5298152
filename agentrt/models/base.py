"""What every model has: a spec read strictly from its config, and the Model protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

from agentrt.errors import ModelUnsupported

if TYPE_CHECKING:
    from torch import Tensor

    from agentrt.kernels import Geometry, Segment, Step


@frozen(kw_only=True)
class RopeSpec:
    """Rotary embedding: base, and one factor a frequency that positions are divided by."""

    theta: float
    kind: str = "default"  # "default", "linear", "llama3" or "factors"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()

    def inverse_frequencies(self, dim: int) -> list[float]:
        """The dim / 2 angles a position turns by, longest wave last (llama3: Meta's Llama 3.1)."""
        plain = [self.theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "factors":
            return [frequency / f for frequency, f in zip(plain, self.factors, strict=True)]
        if self.kind == "llama3":
            return [self._stretch(frequency) for frequency in plain]
        return plain

    def _stretch(self, frequency: float) -> float:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        blend = min(max((turns - self.low_freq_factor) / span, 0.0), 1.0)
        return (1 - blend) * frequency / self.factor + blend * frequency


@frozen(kw_only=True)
class ModelSpec:
    """The numbers that define a Llama-type model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context_tokens: int
    rope: RopeSpec
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: frozenset[int] = field(default=frozenset())

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token keeps in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class Model(Protocol):
    """A model on its device. One forward serves prefill chunks and decode rows together."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def geometry(self) -> Geometry: ...

    def forward(
        self,
        token_ids: Tensor,  # [rows]
        positions: Tensor,  # [rows]
        segments: tuple[Segment, ...],  # those of one row first
        kv: Tensor,  # [layers, 2, blocks, kv_heads, block_tokens, dim]
        output_rows: Tensor,  # [outputs]: the rows whose logits are wanted
    ) -> Tensor:  # [outputs, vocab], float32
        ...

    def run(self, step: Step) -> Tensor:
        """The same, for a step that was planned already."""


# Keys that carry no computation, or that another part reads.
_IGNORED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chat_template",
        "dtype",
        "eos_token_id",
        "eot_token_ids",
        "general_name",
        "initializer_range",
        "is_llama_config",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "quantization_config",
        "rope_interleaved",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "max_window_layers",
        "attention_dropout",
        "bos_token",
        "eos_token",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "name_or_path",
        "tokenizer_name",
        "embedding_multiplier_one",
    ]
)
_READ = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "hidden_act",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
    ]
)
_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "factors": frozenset({"factors"}),
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """A Hugging Face config as a ModelSpec. Every key is read, known to be without effect, or
    an error that names it (ModelUnsupported): an option is never ignored."""
    model_type = str(config.get("model_type"))
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        known = "llama, mistral, qwen2, qwen3"
        raise ModelUnsupported(f"architecture {model_type!r} is not implemented (known: {known})")
    unread = sorted(set(config) - _IGNORED - _READ)
    if unread:
        raise ModelUnsupported(
            f"{model_type} config has options that are not implemented: {unread}"
        )
    _refuse_variants(config)
    heads = config["num_attention_heads"]
    return ModelSpec(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        norm_eps=config["rms_norm_eps"],
        max_context_tokens=config["max_position_embeddings"],
        rope=read_rope(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        eos_token_ids=_token_set(config.get("eos_token_id")),
    )


def _token_set(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _refuse_variants(config: Mapping[str, Any]) -> None:
    """Options that would change the computation and are not implemented."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelUnsupported(f"hidden_act {config['hidden_act']!r}: only 'silu' is implemented")
    if config.get("mlp_bias"):
        raise ModelUnsupported("mlp_bias=true is not implemented")
    if config.get("attention_bias") and config["model_type"] != "qwen2":
        raise ModelUnsupported("attention_bias=true is implemented for qwen2 only")
    window = config.get("sliding_window")
    in_use = config.get("use_sliding_window", True)
    if window is not None and in_use and window < config["max_position_embeddings"]:
        raise ModelUnsupported(
            f"sliding-window attention ({window} tokens) is not implemented: lower "
            f"max_position_embeddings to {window} in config.json to run it with full attention"
        )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds and in_use:
        raise ModelUnsupported(f"layer_types {sorted(kinds)} are not implemented")


def read_rope(config: Mapping[str, Any]) -> RopeSpec:
    """Both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    options = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = options.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = options.pop("rope_type", options.pop("type", "default"))
    options.pop("type", None)
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise ModelUnsupported(f"rope type {kind!r} is not implemented (known: {known})")
    unread = sorted(set(options) - _ROPE_KEYS[kind])
    if unread:
        raise ModelUnsupported(f"rope type {kind!r} has options that are not implemented: {unread}")
    if "factors" in options:
        options["factors"] = tuple(options["factors"])
    return RopeSpec(theta=float(theta), kind=kind, **options)
