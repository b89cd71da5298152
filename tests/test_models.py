"""Every architecture against transformers on the same random weights, and strict configs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from agentrt.config import EngineConfig
from agentrt.errors import ModelUnsupported
from agentrt.kernels import Segment
from agentrt.models.base import read_spec
from agentrt.models.load import LoadedModel, load_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, Any] = {
    "llama2": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, head_dim=32),
    "smollm2": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2.5": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
}
TOKENS = np.random.default_rng(0).integers(0, 300, 150).tolist()


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[request.param])
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


def logits_of(loaded: LoadedModel, chunks: list[int], block_tokens: int = 16) -> torch.Tensor:
    """Logits of TOKENS [tokens, vocab], prefilled in chunks of the given sizes."""
    spec = loaded.model.spec
    blocks = tuple(reversed(range(-(-len(TOKENS) // block_tokens))))
    shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, block_tokens, spec.head_dim)
    kv, parts, start = torch.zeros(shape, dtype=loaded.compute.dtype), [], 0
    with torch.inference_mode():
        for size in chunks:
            ids = torch.tensor(TOKENS[start : start + size])
            positions = torch.arange(start, start + size)
            segments = (Segment(0, size, start, blocks),)
            rows = torch.arange(size)
            parts.append(loaded.model.forward(ids, positions, segments, kv, rows))
            start += size
    assert start == len(TOKENS)
    return torch.cat(parts)


def reference_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def test_equals_transformers(folder: Path) -> None:
    loaded = load_model(folder, EngineConfig(device="cpu", dtype="float32"))
    expected = reference_logits(folder)
    for chunks in ([150], [64, 85, 1], [1] * 150):
        error = (logits_of(loaded, chunks) - expected).abs().max()
        assert error < 1e-3 * max(1.0, float(expected.abs().max()) / 10)


def test_deterministic_bits_do_not_depend_on_chunks(folder: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", deterministic=True)
    loaded = load_model(folder, config)
    whole = logits_of(loaded, [150])
    for chunks in ([64, 85, 1], [1] * 150, [3, 140, 7]):
        assert torch.equal(logits_of(loaded, chunks), whole)


def test_bfloat16_is_close(folder: Path) -> None:
    loaded = load_model(folder, EngineConfig(device="cpu", dtype="bfloat16"))
    expected = reference_logits(folder)
    assert (logits_of(loaded, [150]) - expected).norm() / expected.norm() < 0.05


def test_spec_refuses_what_it_does_not_implement() -> None:
    config = json.loads(ARCHITECTURES["mistral"].to_json_string())
    base = {"model_type": "mistral", **{k: v for k, v in config.items() if k in SIZES}}
    base |= {"rms_norm_eps": 1e-5}
    assert read_spec(base).num_layers == 3
    wrong = {
        "model_type": "gpt_bigcode",
        "sliding_window": 128,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "logit_softcapping": 30.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "layer_types": ["sliding_attention"],
    }
    for key, value in wrong.items():
        with pytest.raises(ModelUnsupported, match=str(value if key == "model_type" else key)[:4]):
            read_spec(base | {key: value})


def test_a_rope_option_that_is_not_read_is_named() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}
    config = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_scaling": rope}
    with pytest.raises(ModelUnsupported, match="attention_factor"):
        read_spec(config)
