"""What a GGUF file says of its model, in Hugging Face's words: config keys and tensor names."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import frozen

from agentrt.errors import ModelUnsupported, WeightsInvalid
from agentrt.gguf_file import GgufFile, GgufTensor

ROPE_FACTORS = "rope_freqs.weight"  # not a weight: llama 3's frequency factors, see `config_of`
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"(\w+)\.(weight|bias)")
_MAX_ROPE_FACTORS = 4096


@frozen
class MappedTensor:
    """A GGUF tensor under its Hugging Face name.

    `interleaved_heads` is the number of attention heads whose rows the converter of llama models
    interleaved (x0 y0 x1 y1 ...), where Hugging Face has halves (x0 x1 ... y0 y1 ...); 0: none.
    """

    tensor: GgufTensor
    interleaved_heads: int


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None where it has none."""
    if layer := _LAYER_NAME.fullmatch(name):
        inner = _INNER.get(layer[2])
        return inner and f"model.layers.{int(layer[1])}.{inner}.{layer[3]}"
    outer = _OUTER_NAME.fullmatch(name)
    stem = outer and _OUTER.get(outer[1])
    return f"{stem}.{outer[2]}" if outer and stem else None


def map_tensors(gguf: GgufFile, config: Mapping[str, Any]) -> Mapping[str, MappedTensor]:
    """The file's tensors by Hugging Face name.

    Raises ModelUnsupported naming the tensors that no supported architecture has.
    """
    heads = {}
    if gguf.architecture == "llama":
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    mapped, unknown = {}, []
    for name, tensor in gguf.tensors.items():
        target = hf_name(name)
        if target is not None:
            stem = target.split(".")[-2]
            mapped[target] = MappedTensor(tensor, heads.get(stem, 0))
        elif name != ROPE_FACTORS:
            unknown.append(name)
    if unknown:
        shown = ", ".join(sorted(unknown)[:8])
        raise ModelUnsupported(
            f"{gguf.path}: {len(unknown)} tensors are of no supported architecture: {shown}"
        )
    return MappingProxyType(mapped)


def config_of(gguf: GgufFile) -> dict[str, Any]:
    """The content of the config.json that the file was converted from.

    Frequency factors of llama 3 become `rope_scaling = {"rope_type": "factors", "factors": [...]}`:
    each inverse frequency is divided by its factor.
    """
    kind = gguf.architecture
    if kind not in _CLASSES:
        raise ModelUnsupported(
            f"{gguf.path}: architecture {kind!r} is not implemented, {sorted(_CLASSES)} are"
        )
    config = _sizes(gguf, kind)
    config |= {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(gguf.require(f"{kind}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(float(gguf.metadata.get(f"{kind}.rope.freq_base", 10000.0))),
        "rope_scaling": _rope_scaling(gguf, kind),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    }
    window = gguf.metadata.get(f"{kind}.attention.sliding_window")
    if window:
        config["sliding_window"] = window
    return config | token_ids_of(gguf)


def token_ids_of(gguf: GgufFile) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` (a list where the file names several ends)."""
    ids: dict[str, Any] = {}
    prefix = "tokenizer.ggml."
    if isinstance(bos := gguf.metadata.get(f"{prefix}bos_token_id"), int):
        ids["bos_token_id"] = bos
    ends = (gguf.metadata.get(f"{prefix}{name}_token_id") for name in ("eos", "eot", "eom"))
    unique = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if unique:
        ids["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return ids


def _sizes(gguf: GgufFile, kind: str) -> dict[str, Any]:
    def size(key: str) -> int:
        value: int = gguf.require(f"{kind}.{key}", int)
        if value < 1:
            raise WeightsInvalid(f"{gguf.path}: {kind}.{key} is {value}, it must be positive")
        return value

    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = gguf.metadata.get(f"{kind}.attention.key_length", hidden // heads)
    value_dim = gguf.metadata.get(f"{kind}.attention.value_length", head_dim)
    rotated = gguf.metadata.get(f"{kind}.rope.dimension_count", head_dim)
    if not head_dim == value_dim == rotated:
        raise ModelUnsupported(
            f"{gguf.path}: key length {head_dim}, value length {value_dim} and rotary dimension "
            f"{rotated} differ, which is not implemented"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightsInvalid(f"{gguf.path}: tensor 'token_embd.weight' is missing")
    grouped = f"{kind}.attention.head_count_kv" in gguf.metadata
    return {
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv") if grouped else heads,
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "vocab_size": embedding.shape[0],
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where 9.99999974e-06 is stored."""
    packed = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == packed:
            return short
    return value


def _rope_scaling(gguf: GgufFile, kind: str) -> dict[str, Any] | None:
    factors = gguf.tensors.get(ROPE_FACTORS)
    if factors is not None:
        return {"rope_type": "factors", "factors": _float_values(gguf, factors)}
    prefix = f"{kind}.rope.scaling."
    scaling = gguf.metadata.get(f"{prefix}type", "none")
    if scaling == "none":
        return None
    rope: dict[str, Any] = {"rope_type": scaling, "factor": gguf.require(f"{prefix}factor", float)}
    original = gguf.metadata.get(f"{prefix}original_context_length")
    if original is not None:
        rope["original_max_position_embeddings"] = original
    return rope


def _float_values(gguf: GgufFile, tensor: GgufTensor) -> list[float]:
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
        raise WeightsInvalid(
            f"{gguf.path}: {tensor.name} must be a row of F32, it is {tensor.type.name} "
            f"{tensor.shape}"
        )
    with gguf.read(tensor) as raw:
        return list(struct.unpack(f"<{tensor.shape[0]}f", raw))
