"""A whole engine on a GPU: graphs against plain launches, and greedy tokens against float32."""

import asyncio
import json
from pathlib import Path

import attrs
import pytest
import torch
from gpu import DEVICE, needs_gpu, relative_error
from told import told

from agentrt import Completion, Engine, EngineConfig, GenerateOptions
from agentrt.kernels import Segment
from agentrt.models.load import load_model

pytestmark = [pytest.mark.gpu, needs_gpu]

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 2048,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
PROMPTS = [[(7 * i + i * i // 5 + 3 * k) % 2048 for i in range(20 + 37 * k)] for k in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


def config(**changes: object) -> EngineConfig:
    base = {"device": "cuda", "random_weights": True, "max_batch": 16, "device_kv_bytes": 1 << 29}
    return EngineConfig(**(base | changes))  # type: ignore[arg-type]


def float32_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Of plain torch, with the weights that the bf16 engine draws."""
    narrow = load_model(folder, config(dtype="bfloat16")).model
    wide = load_model(folder, config(dtype="float32")).model
    with torch.inference_mode():
        wide.embedding.copy_(narrow.embedding)
        wide.head.weight.copy_(narrow.head.weight)
        for to, source in zip(wide.layers, narrow.layers, strict=True):
            for name in ("qkv", "output", "gate_up", "down"):
                getattr(to, name).weight.copy_(getattr(source, name).weight)
        spec, blocks = wide.spec, tuple(range(len(tokens) // 16 + 1))
        shape = (spec.num_layers, 2, len(blocks), spec.num_kv_heads, 16, spec.head_dim)
        kv, ids = torch.zeros(shape, device=DEVICE), torch.tensor(tokens, device=DEVICE)
        logits = []
        for start in range(0, len(tokens), 2000):  # all scores at once would take gigabytes
            chunk = ids[start : start + 2000]
            rows = torch.arange(len(chunk), device=DEVICE)
            segments = (Segment(0, len(chunk), start, blocks),)
            logits.append(wide.forward(chunk, rows + start, segments, kv, rows))
        return torch.cat(logits)


async def test_greedy_tokens_are_the_largest_of_float32_or_near(folder: Path) -> None:
    options = GenerateOptions(max_tokens=24, ignore_eos=True)
    async with Engine(folder, config()) as engine:
        done = await asyncio.gather(*(engine.generate(prompt, options) for prompt in PROMPTS))
        await engine.check()
        assert engine.stats().kernels == "triton"
    for prompt, one in zip(PROMPTS[::6], done[::6], strict=True):
        tokens = [*prompt, *one.token_ids]
        logits = (await asyncio.to_thread(float32_logits, folder, tokens))[len(prompt) - 1 : -1]
        got = logits.gather(1, torch.tensor(one.token_ids, device=DEVICE)[:, None])[:, 0]
        assert (logits.max(-1).values - got).max() < 0.1 * logits.std()


REPEATED = [[(5 * i + k) % 31 + 40 * k for i in range(4 + k)] * 12 for k in range(1, 7)]


async def assert_no_clear_token_changed(
    folder: Path, plain: list[Completion], drafted: list[Completion], prompts: list[list[int]]
) -> None:
    """Each token is the largest of float32 or near, and the first one that differs, if any, is one
    of two that are near each other: rows of a draft go through other kernels than rows alone."""
    for prompt, one, other in zip(prompts, plain, drafted, strict=True):
        tokens = [*prompt, *other.token_ids]
        logits = (await asyncio.to_thread(float32_logits, folder, tokens))[len(prompt) - 1 : -1]
        got = logits.gather(1, torch.tensor(other.token_ids, device=DEVICE)[:, None])[:, 0]
        assert (logits.max(-1).values - got).max() < 0.1 * logits.std()
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
        differ = next((i for i, (a, b) in pairs if a != b), None)
        if differ is not None:
            mine, its = (logits[differ, each.token_ids[differ]] for each in (other, one))
            assert abs(mine - its) < 0.1 * logits.std()


@pytest.mark.parametrize("wrong", [frozenset(), frozenset(range(0, 40, 3))])
async def test_drafts_change_no_clear_token(folder: Path, wrong: frozenset[int]) -> None:
    """Drafts of what comes without them, with some tokens wrong, at one request and at six."""
    options = GenerateOptions(max_tokens=40, ignore_eos=True)
    async with Engine(folder, config(speculation=False)) as engine:
        plain = await asyncio.gather(*(engine.generate(p, options) for p in REPEATED))
    async with Engine(folder, config()) as engine:
        drafter = told(REPEATED, [one.token_ids for one in plain], wrong=wrong)
        drafter.limits = attrs.evolve(drafter.limits, guesses_a_request=0.0)  # six requests guess
        engine._open.loop.scheduler.drafter = drafter
        alone = await engine.generate(REPEATED[0], options)
        drafted = await asyncio.gather(*(engine.generate(p, options) for p in REPEATED))
        await engine.check()
        stats = engine.stats()
    assert stats.accepted_tokens > 40  # a text that has left the other one has no right drafts
    assert (stats.accepted_tokens < stats.drafted_tokens - 20) or not wrong
    await assert_no_clear_token_changed(folder, plain, drafted, REPEATED)
    await assert_no_clear_token_changed(folder, plain[:1], [alone], REPEATED[:1])


async def test_speculation_changes_no_clear_token(folder: Path) -> None:
    """As an engine drafts by itself, greedily: what it repeats of its own text."""
    options = GenerateOptions(max_tokens=120, ignore_eos=True)
    done = {}
    for speculation in (False, True):
        async with Engine(folder, config(speculation=speculation)) as engine:
            asked = [engine.generate(prompt, options) for prompt in REPEATED[:3]]
            done[speculation] = await asyncio.gather(*asked)
            await engine.check()
    await assert_no_clear_token_changed(folder, done[False], done[True], REPEATED[:3])


async def test_draws_are_repeatable_whatever_is_beside_them(folder: Path) -> None:
    options = GenerateOptions(max_tokens=12, ignore_eos=True, temperature=0.8, seed=3)
    plain = GenerateOptions(max_tokens=12, ignore_eos=True)
    async with Engine(folder, config()) as engine:
        alone = await engine.generate(PROMPTS[2], options)
        both = await asyncio.gather(
            engine.generate(PROMPTS[2], options), *(engine.generate(p, plain) for p in PROMPTS[4:8])
        )
    assert alone.token_ids == both[0].token_ids


@pytest.mark.parametrize("long_prefill", ["triton", "auto"])
async def test_long_prompts_equal_float32(folder: Path, long_prefill: str) -> None:
    prompt = [(11 * i + i * i // 7) % 2048 for i in range(12000)]
    options = GenerateOptions(max_tokens=1, ignore_eos=True, top_logprobs=20)
    async with Engine(folder, config(long_prefill=long_prefill, step_tokens=4096)) as engine:
        done = await engine.generate(prompt, options)
    assert done.logprobs is not None
    top = done.logprobs[0].top
    logits = await asyncio.to_thread(float32_logits, folder, prompt)
    expected = logits[-1].log_softmax(-1)
    ids = [token for token, _ in top]
    values = torch.tensor([value for _, value in top], device=DEVICE)
    assert relative_error(values, expected[ids]) < 0.02
