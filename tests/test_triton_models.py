"""Whole models on the Triton path, interpreted where there is no GPU, against transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from gpu import DEVICE, interpreted, relative_error
from test_models import ARCHITECTURES, TOKENS, reference_logits

from agentrt.config import EngineConfig
from agentrt.errors import ConfigError
from agentrt.kernels import Segment
from agentrt.kernels.cuda import CudaOps
from agentrt.models.llama import LlamaModel, expected_shapes
from agentrt.models.load import load_model
from agentrt.weights import load_tensors, open_checkpoint

pytestmark = interpreted


@pytest.fixture(params=["qwen3", "qwen2.5"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Weights that bf16 holds exactly, so that only the computation differs."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[request.param])
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    model.bfloat16().float().save_pretrained(tmp_path)
    return tmp_path


def triton_model(folder: Path, **options: bool) -> LlamaModel:
    spec = load_model(folder, EngineConfig(device="cpu", dtype="float32")).model.spec
    ops = CudaOps(DEVICE, pdl=DEVICE.type == "cuda", **options)
    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        tensors = load_tensors(checkpoint, expected_shapes(spec), torch.bfloat16, None)
        placed = ((name, tensor.to(DEVICE)) for name, tensor in tensors)
        return LlamaModel.build(spec, ops, placed, 512)


def logits_of(
    model: LlamaModel, chunks: list[int], block_tokens: int = 16, most_rows: int = 1000
) -> torch.Tensor:
    """As in test_models, on the device; of each chunk's last rows, `most_rows` at most."""
    spec = model.spec
    blocks = tuple(reversed(range(-(-len(TOKENS) // block_tokens))))
    shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, block_tokens, spec.head_dim)
    kv, parts, start = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE), [], 0
    with torch.inference_mode():
        for size in chunks:
            ids = torch.tensor(TOKENS[start : start + size], device=DEVICE)
            positions = torch.arange(start, start + size, device=DEVICE)
            rows = torch.arange(max(size - most_rows, 0), size, device=DEVICE)
            segments = (Segment(0, size, start, blocks),)
            parts.append(model.forward(ids, positions, segments, kv, rows))
            start += size
    return torch.cat(parts).cpu()


def test_equals_transformers(folder: Path) -> None:
    """Prefill by cuBLAS, by skinny products, and decode by either kind; then all in one order."""
    all_expected, most_rows = reference_logits(folder), 3
    for options, chunks in (({}, [66, 20, 1, 1]), ({"deterministic": True}, [20, 1, 1])):
        logits = logits_of(triton_model(folder, **options), chunks, most_rows=most_rows)
        rows, end = [], 0
        for size in chunks:
            rows += range(end + max(size - most_rows, 0), end + size)
            end += size
        assert relative_error(logits, all_expected[rows]) < 0.05


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
@pytest.mark.parametrize("deterministic", [False, True])
def test_only_the_output_rows_leave_the_last_layer(folder: Path, deterministic: bool) -> None:
    """All rows, one (by other products) and none: the same logits, the same pool."""
    model, size = triton_model(folder, deterministic=deterministic), 10
    spec = model.spec
    ids, positions = torch.tensor(TOKENS[:size], device=DEVICE), torch.arange(size, device=DEVICE)
    blocks = tuple(range(5))
    pools, found = [], []
    for wanted in (list(range(size)), [size - 1], []):
        shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, 16, spec.head_dim)
        pools.append(torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE))
        rows = torch.tensor(wanted, dtype=torch.int32, device=DEVICE)
        segments = (Segment(0, size, 0, blocks),)
        with torch.inference_mode():
            found.append(model.forward(ids, positions, segments, pools[-1], rows))
        assert found[-1].shape == (len(wanted), spec.vocab_size)
        assert torch.equal(pools[-1], pools[0])
        if deterministic:
            assert torch.equal(found[-1], found[0][wanted])
        elif wanted:
            assert relative_error(found[-1], found[0][wanted]) < 0.02


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_fp8_weights_are_near(folder: Path) -> None:
    expected = reference_logits(folder)
    logits = logits_of(triton_model(folder, fp8=True), [70, 1, 1])
    assert relative_error(logits, expected[: len(logits)]) < 0.3


def test_a_shape_that_is_not_served_is_refused() -> None:
    ops = CudaOps(DEVICE)
    served = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096}
    served["intermediate_size"] = 14336
    ops.check(**served)
    wrong = {"head_dim": 80, "num_kv_heads": 1, "hidden_size": 100, "intermediate_size": 300}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match="float32"):
            ops.check(**served | {name: value})
