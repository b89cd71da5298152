"""fp8 on a GPU, weights or keys and values: how far logits are from float32; a whole engine."""

import asyncio
import json
import logging
import random
from pathlib import Path

import pytest
import torch
from attrs import evolve
from gpu import DEVICE, needs_gpu, relative_error
from rounded import attend_rounded
from test_gpu_accuracy import BLOCK_TOKENS, CONTEXT, Case, case, forward, pool  # noqa: F401
from test_gpu_engine import SHAPE
from test_tiers import fast_loads

from agentrt import Completion, Engine, EngineConfig, GenerateOptions
from agentrt.kernels import Linear, reference
from agentrt.kernels.attention_prefill import plan_tiles, prefill_attention
from agentrt.kernels.attention_prefix import attend_prefix
from agentrt.kernels.cuda import CudaOps
from agentrt.kernels.cuda_products import CudaLinear
from agentrt.kernels.dispatch import Compute
from agentrt.kernels.narrow import KV_DTYPE, LARGEST, power_scales
from agentrt.models.llama import LlamaModel
from agentrt.models.load import LoadedModel, narrow_kv

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

logger = logging.getLogger(__name__)  # --log-cli-level=INFO shows the errors
# Of the error that float32 has, where keys and values, or weights, are rounded to e4m3 and nothing
# else is; and what bf16 adds.
MOST_TIMES, MOST_ADDED = 1.5, 0.01


def narrow(model: LlamaModel) -> LlamaModel:
    compute = Compute(device=DEVICE, dtype=torch.bfloat16, ops=model.ops, weights="bfloat16")
    return narrow_kv(LoadedModel(model, compute, "")).model


def errors(model: LlamaModel, case: Case, dtype: torch.dtype) -> dict[str, float]:  # noqa: F811
    """Prefill by cuBLAS and by skinny products, then decode: one row, and sixteen at once."""
    kv, found = pool(model, 16, dtype), {}
    for name, start, number in (("dense", 0, 512), ("skinny", 512, 60)):
        logits = forward(model, case, kv, [(0, start, number)])
        found[name] = relative_error(logits, case.expected[start : start + number])
    ones = [forward(model, case, kv, [(0, 572 + i, 1)]) for i in range(12)]
    found["one row"] = relative_error(torch.cat(ones), case.expected[572:584])
    each = CONTEXT // BLOCK_TOKENS
    for copy in range(1, 16):
        kv[:, :, copy * each : copy * each + each] = kv[:, :, :each]
    positions = [37 * i + 5 for i in range(16)]
    logits = forward(model, case, kv, [(copy, p, 1) for copy, p in enumerate(positions)])
    found["batch"] = relative_error(logits, case.expected[positions])
    return found


def test_keys_and_values(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    found = errors(narrow(case.ours(torch.bfloat16)), case, KV_DTYPE)
    wide = case.ours(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "attend_segment", attend_rounded)
        logits = forward(wide, case, pool(wide, 1, torch.float32), [(0, 0, 600)])
    floor = relative_error(logits, case.expected)
    logger.info("fp8 KV: relative errors %s; by the rounding alone %.4f", found, floor)
    assert max(found.values()) < MOST_TIMES * floor + MOST_ADDED


@torch.inference_mode()
def test_weights(case: Case) -> None:  # noqa: F811
    model, wide = case.ours(torch.bfloat16, fp8=True), case.ours(torch.float32)
    found = errors(model, case, torch.bfloat16)
    names = ("qkv", "output", "gate_up", "down")
    wide.layers = tuple(
        evolve(to, **{name: widened(wide, getattr(source, name)) for name in names})
        for to, source in zip(wide.layers, model.layers, strict=True)
    )
    wide.head = widened(wide, model.head)
    logits = forward(wide, case, pool(wide, 1, torch.float32), [(0, 0, 600)])
    floor = relative_error(logits, case.expected)
    logger.info("fp8 weights: relative errors %s; by the rounding alone %.4f", found, floor)
    assert max(found.values()) < MOST_TIMES * floor + MOST_ADDED


def widened(model: LlamaModel, linear: CudaLinear) -> Linear:
    assert linear.scales is not None
    return model.ops.pack_linear(linear.weight.float() * linear.scales[:, None], None)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 64), (32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_long_prefill_attention(heads: int, kv_heads: int, dim: int, with_prefix: bool) -> None:
    """600 rows after 6,656 tokens, wholly by the Triton kernel, or the whole blocks by cuDNN."""
    torch.manual_seed(1)
    rows, before, blocks, group = 600, 6656, 120, heads // kv_heads
    wide = torch.randn(2, blocks, kv_heads, BLOCK_TOKENS, dim, device=DEVICE)
    scales = power_scales(wide.abs().amax((1, 3, 4)))
    each = scales[:, None, :, None, None]
    kv = (wide / each).clamp(-LARGEST, LARGEST).to(KV_DTYPE)
    order = torch.randperm(blocks, device=DEVICE)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=DEVICE).bfloat16()
    query = qkv.view(rows, -1, dim)[:, :heads]
    keys, values = (
        c[order].transpose(0, 1).flatten(1, 2)[:, : before + rows].double()
        for c in kv.float() * each
    )
    ahead = torch.arange(before + rows, device=DEVICE)[None] > (
        before + torch.arange(rows, device=DEVICE)[:, None]
    )
    scores = torch.einsum("rhd,htd->hrt", query.double(), keys.repeat_interleave(group, 0))
    weights = (scores * dim**-0.5).masked_fill_(ahead, float("-inf")).softmax(-1)
    expected = torch.einsum("hrt,htd->rhd", weights, values.repeat_interleave(group, 0)).flatten(1)
    prefix = None
    if with_prefix:
        packed = query.reshape(rows, kv_heads, group, dim).transpose(0, 1).contiguous()
        prefix = attend_prefix(packed, rows, kv, order[: before // BLOCK_TOKENS].int(), scales)
    geometry = type("G", (), {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim})
    shape, tiles = CudaOps(DEVICE).plan_chunks([(0, before, rows, 0)], geometry)  # type: ignore[arg-type]
    assert tiles == plan_tiles([(0, before, rows, 0)], group, shape.rows)
    out = qkv.new_full((rows, heads * dim), float("nan"))
    described = torch.tensor(tiles, device=DEVICE).int()
    prefill_attention(qkv, kv, out, order[None].int(), described, shape, prefix, None, scales)
    error = relative_error(out, expected)
    logger.info("error %.4f", error)
    assert error < 6e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


TOKEN_BYTES = 3 * 2 * 2 * 128  # of SHAPE, a byte a number
PROMPTS = [[random.Random(i).randrange(2048) for _ in range(3000)] for i in range(10)]


async def run(folder: Path, **settings: object) -> tuple[list[Completion], object]:
    """Ten conversations at once, then each continued."""
    base = {"device": "cuda", "random_weights": True, "max_batch": 8, "disk_kv_bytes": 0}
    options = GenerateOptions(max_tokens=8, ignore_eos=True, top_logprobs=5)
    config = EngineConfig(**(base | settings))  # type: ignore[arg-type]
    async with Engine(folder, config) as engine:
        await asyncio.gather(*(engine.generate(prompt, options) for prompt in PROMPTS))
        await asyncio.sleep(1.0)
        again = [await engine.generate([*prompt, 5, 6, 7], options) for prompt in PROMPTS]
        await engine.check()
        return again, engine.stats()


def assert_near(some: list[Completion], others: list[Completion], most: float) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        expected, got = dict(one.logprobs[0].top), dict(other.logprobs[0].top)
        common = expected.keys() & got.keys()
        assert len(common) >= 3
        assert max(abs(expected[token] - got[token]) for token in common) < most


async def test_an_engine_keeps_twice_the_tokens_and_gets_them_back(folder: Path) -> None:
    """Under pressure, from the host tier, as with room for all; and near an engine of bf16."""
    wide, _ = await run(folder, device_kv_bytes=40_000 * 2 * TOKEN_BYTES, host_kv_bytes=0)
    roomy, stats = await run(
        folder, kv_dtype="fp8", device_kv_bytes=40_000 * TOKEN_BYTES, host_kv_bytes=0
    )
    assert stats.kv_blocks == 40_000 // 64  # type: ignore[attr-defined]
    assert "fp8" in stats.kernels  # type: ignore[attr-defined]
    pressed, stats = await run(
        folder,
        kv_dtype="fp8",
        device_kv_bytes=10_240 * TOKEN_BYTES,
        host_kv_bytes=64_000 * TOKEN_BYTES,
    )
    assert stats.loaded_tokens["host"] > 2_000  # type: ignore[attr-defined]
    assert_near(roomy, pressed, 0.05)
    assert_near(wide, roomy, 0.15)


async def test_a_later_engine_reads_from_disk_what_one_kept(folder: Path, tmp_path: Path) -> None:
    """It finds the same scales, or it would find nothing; another kind of KV is not its own."""
    options = GenerateOptions(max_tokens=8, ignore_eos=True, top_logprobs=5)
    found = []
    for kv_dtype in ("fp8", "fp8", "auto"):
        config = EngineConfig(
            device="cuda",
            random_weights=True,
            device_kv_bytes=64 << 20,
            host_kv_bytes=64 << 20,
            cache_dir=tmp_path,
            disk_kv_bytes=256 << 20,
            kv_dtype=kv_dtype,  # type: ignore[arg-type]
        )
        async with Engine(folder, config) as engine:
            fast_loads(engine)
            found.append(await engine.generate(PROMPTS[0], options))
    cached = [one.usage.cached_tokens["disk"] for one in found]
    assert cached[0] == cached[2] == 0
    assert cached[1] > 2_000
    assert_near(found[:1], found[1:2], 0.05)
