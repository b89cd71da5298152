"""8-bit weights, and models with a KV pool of 8 bits, on the Triton path, interpreted where there
is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from fakes import make_request
from gpu import DEVICE, HAS_GPU, interpreted, relative_error
from interpreted import SHAPE, Drive, small_config, step_device
from rounded import attend_rounded
from test_models import TOKENS, reference_logits
from test_triton_models import folder, triton_model  # noqa: F401

from agentrt.config import EngineConfig
from agentrt.cuda_runner import CudaRunner
from agentrt.engine_tiers import fingerprint_of
from agentrt.errors import ConfigError
from agentrt.kernels import Segment, reference
from agentrt.kernels.cuda import CudaOps
from agentrt.kernels.dispatch import Compute, choose_compute
from agentrt.kernels.narrow import KV_DTYPE
from agentrt.kernels.reference import ReferenceOps
from agentrt.kernels.skinny import SkinnyTiles, SkinnyWork, skinny
from agentrt.kernels.widen import widen
from agentrt.models import kv_scales
from agentrt.models.kv_scales import digest_of
from agentrt.models.llama import LlamaModel, expected_shapes
from agentrt.models.load import LoadedModel, load_model, narrow_kv
from agentrt.request import Request
from agentrt.types import GenerateOptions
from agentrt.weights import load_tensors, open_checkpoint

pytestmark = interpreted


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens to find scales from: they are interpreted."""
    monkeypatch.setattr(kv_scales, "MOST_TOKENS", 48)


def every_number() -> torch.Tensor:
    """All 254 of e4m3, twice two zeros in place of what is no number: [256]."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = codes[[0x00, 0x80]]
    return codes.view(torch.float8_e4m3fn)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().view(torch.int16)


@pytest.mark.parametrize(("rows", "columns"), [(3, 256), (7, 48), (5, 2064), (130, 64)])
def test_weights_are_widened_bit_for_bit(rows: int, columns: int) -> None:
    """As torch does it in two steps: both factors in bf16, their product rounded once. Where a
    device rounds, the interpreter cuts off: the scale, and the product."""
    torch.manual_seed(rows)
    places = torch.arange(rows)[:, None] * 5 + torch.arange(columns)
    weight = every_number().view(torch.uint8)[places % 256].view(torch.float8_e4m3fn)
    ones = widen(weight.to(DEVICE), torch.ones(rows, device=DEVICE), torch.bfloat16)
    assert torch.equal(bits_of(ones), bits_of(weight.float().bfloat16()))
    scales = torch.randn(rows).exp() * 1e-3
    expected = weight.to(torch.bfloat16).mul_(scales[:, None].to(torch.bfloat16))
    got = widen(weight.to(DEVICE), scales.to(DEVICE), torch.bfloat16)
    most = 0 if HAS_GPU else 3
    assert (bits_of(got).int() - bits_of(expected).int()).abs().max() <= most


@pytest.mark.parametrize("columns", [256, 272])
def test_a_product_of_few_rows_takes_every_weight_for_what_it_is(columns: int) -> None:
    """Each row of the batch picks one column; the tiles of 128 are whole ones, and not."""
    places = torch.arange(256)[:, None] * 3 + torch.arange(columns)
    weight = every_number().view(torch.uint8)[places % 256].view(torch.float8_e4m3fn)
    picked = torch.tensor([0, 1, 8, 9, 127, 128, 200, columns - 1])
    x = torch.zeros(8, columns).scatter_(1, picked[:, None], 1.0).bfloat16().to(DEVICE)
    partial = torch.empty(1 << 16, dtype=torch.float32, device=DEVICE)
    work = SkinnyWork(partial, torch.zeros(64, dtype=torch.int32, device=DEVICE))
    out = torch.full((8, 256), float("nan"), device=DEVICE)
    skinny(weight.to(DEVICE), x, out, work, scales=torch.ones(256, device=DEVICE))
    assert torch.equal(out.cpu(), weight.float()[:, picked].t())


def test_tiles_of_8_bit_weights_depend_on_the_shape_alone() -> None:
    tiles = SkinnyTiles.choose_narrow(32, 8192)
    assert (tiles.splits, tiles.columns, tiles.is_deep) == (8, 128, True)
    assert SkinnyTiles.choose(32, 8192).is_deep


def narrow(folder: Path) -> LoadedModel:  # noqa: F811
    model = triton_model(folder)
    compute = Compute(device=DEVICE, dtype=torch.bfloat16, ops=model.ops, weights="bfloat16")
    return narrow_kv(LoadedModel(model, compute, "digest"))


def logits_of(loaded: LoadedModel, chunks: list[int], block_tokens: int = 16) -> torch.Tensor:
    """As in test_triton_models."""
    spec = loaded.model.spec
    blocks = tuple(reversed(range(-(-len(TOKENS) // block_tokens))))
    shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, block_tokens, spec.head_dim)
    kv, parts, start = torch.zeros(shape, dtype=loaded.compute.dtype, device=DEVICE), [], 0
    with torch.inference_mode():
        for size in chunks:
            ids = torch.tensor(TOKENS[start : start + size], device=DEVICE)
            positions = torch.arange(start, start + size, device=DEVICE)
            rows = torch.arange(size, device=DEVICE)
            segments = (Segment(0, size, start, blocks),)
            parts.append(loaded.model.forward(ids, positions, segments, kv, rows))
            start += size
    return torch.cat(parts).cpu()


def rounded_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:  # noqa: F811
    """The first 92 tokens' logits in float32, where nothing else is rounded."""
    device = torch.device("cpu")
    spec = load_model(folder, EngineConfig(device="cpu", dtype="float32")).model.spec
    with open_checkpoint(folder) as checkpoint:
        tensors = load_tensors(checkpoint, expected_shapes(spec), torch.float32, None)
        model = LlamaModel.build(spec, ReferenceOps(device), tensors, 512)
    kv = torch.zeros(spec.num_layers, 2, 6, spec.num_kv_heads, 16, spec.head_dim)
    rows, segments = torch.arange(92), (Segment(0, 92, 0, tuple(range(6))),)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(reference, "attend_segment", attend_rounded)
        return model.forward(torch.tensor(TOKENS[:92]), rows, segments, kv, rows)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_logits_are_as_near_as_the_rounding_lets_them(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill by either kind of products, and decode; the scales are the same each time."""
    expected, loaded = reference_logits(folder), narrow(folder)
    assert loaded.compute.dtype == KV_DTYPE
    logits = logits_of(loaded, [70, 20, 1, 1])
    floor = relative_error(rounded_alone(folder, monkeypatch), expected[:92])
    assert 0.7 * floor < relative_error(logits, expected[:92]) < 1.3 * floor < 0.2
    spec = loaded.model.spec
    scales = loaded.model.ops.kv_scales
    assert scales.shape == (spec.num_layers, 2, spec.num_kv_heads)
    assert torch.equal(narrow(folder).model.ops.kv_scales, scales)


@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
def test_a_store_tells_scales_apart(folder: Path) -> None:  # noqa: F811
    config, wide = EngineConfig(), triton_model(folder)
    compute = Compute(device=DEVICE, dtype=torch.bfloat16, ops=wide.ops, weights="bfloat16")
    plain = LoadedModel(wide, compute, "digest")
    first = narrow_kv(plain)
    with torch.inference_mode():
        for layer in wide.layers:
            layer.qkv.weight.mul_(4)
    second = narrow_kv(plain)
    assert digest_of(first.model.ops.kv_scales) != digest_of(second.model.ops.kv_scales)
    prints = [fingerprint_of(config, loaded, 1024) for loaded in (plain, first, second)]
    assert len({one.encode() for one in prints}) == 3
    assert first.compute.kv_layout.group_tokens == 1


def test_a_runner_with_an_8_bit_pool_gives_a_models_tokens(tmp_path: Path) -> None:
    """Through graphs, mixed steps and copies of blocks: as each request alone."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"head_dim": 32}))
    plain = EngineConfig(device="cpu", dtype="bfloat16", random_weights=True)
    spec = load_model(tmp_path, plain).model.spec
    ops, generator = CudaOps(DEVICE, pdl=HAS_GPU), torch.Generator().manual_seed(1)

    def tensors():
        for name, shape in expected_shapes(spec).items():
            weight = torch.randn(shape, generator=generator) * (0.4 if len(shape) > 1 else 1)
            yield name, weight.to(DEVICE, torch.bfloat16)

    config = small_config()
    model = LlamaModel.build(spec, ops, tensors(), config.max_context_tokens)
    compute = Compute(device=DEVICE, dtype=torch.bfloat16, ops=ops, weights="bfloat16")
    loaded = narrow_kv(LoadedModel(model, compute, "digest"))
    runner = CudaRunner.open(loaded.model, loaded.compute, config, step_device())
    assert runner.kv.dtype == KV_DTYPE
    shared = [5 * i % 251 for i in range(40)]  # its third block is copied before it is continued
    prompts = [shared, [*shared, 7, 8], [3, 1, 4, 1, 5], [*shared[:37], 9]]
    drive = Drive(runner, None)
    outputs = [drive.run(requests_of(prompts[:1]))[0], *drive.run(requests_of(prompts[1:]))]
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor(prompt + output, device=DEVICE)
        rows, blocks = torch.arange(len(tokens), device=DEVICE), tuple(range(len(tokens) // 16 + 1))
        kv = torch.zeros(1, 2, len(blocks), 1, 16, 32, dtype=KV_DTYPE, device=DEVICE)
        with torch.inference_mode():
            segments = (Segment(0, len(tokens), 0, blocks),)
            logits = loaded.model.forward(tokens, rows, segments, kv, rows)[len(prompt) - 1 : -1]
        got = logits.gather(1, tokens[len(prompt) :, None])[:, 0]
        assert (logits.max(-1).values - got).max() < 0.1 * logits.std()
    runner.close()


def requests_of(prompts: list[list[int]]) -> list[Request]:
    options = GenerateOptions(max_tokens=6, ignore_eos=True)
    return [make_request(prompt, 6, options=options) for prompt in prompts]


def test_narrow_heads_are_refused() -> None:
    ops = CudaOps(DEVICE, kv_scales=torch.ones(1, 2, 2))
    shape = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 128, "intermediate_size": 256}
    ops.check(**shape, head_dim=32)
    with pytest.raises(ConfigError, match="head_dim"):
        ops.check(**shape, head_dim=16)


def test_what_cannot_have_it_says_so(tmp_path: Path) -> None:
    base = {"device": "cuda", "dtype": "auto", "weights": "auto", "deterministic": False}
    base |= {"is_quantised": False, "cache_dir": tmp_path, "kv_dtype": "fp8"}
    for wrong in (
        {"device": "cpu"},
        {"dtype": "float32"},
        {"deterministic": True},
        {"decode_launch": "persistent"},
    ):
        with pytest.raises(ConfigError, match="kv_dtype='fp8'"):
            choose_compute(**(base | wrong))
    with pytest.raises(ConfigError, match="disk_kv_dtype"):
        load_model(tmp_path, EngineConfig(kv_dtype="fp8", disk_kv_dtype="int8"))
    with pytest.raises(ConfigError, match="kv_dtype"):
        EngineConfig(kv_dtype="int8")  # type: ignore[arg-type]
