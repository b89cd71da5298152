"""A result never depends on the batch, the chunks or the cache: bitwise, through the engine."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.config import default_cache_dir
from agentrt.kernels.dispatch import load_native
from agentrt.kernels.native_build import NativeUnavailable
from agentrt.types import Completion

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
try:
    NATIVE = load_native(default_cache_dir())
except NativeUnavailable as exc:
    pytest.skip(f"bits are promised by the native kernels: {exc}", allow_module_level=True)
KINDS = {"float32": {"dtype": "float32", "deterministic": True}}
ELEMENT_BYTES = {"float32": 4, "int8": 2 if NATIVE.has_bfloat16 else 4}  # of the KV pool
if NATIVE.has_int8:
    KINDS["int8"] = {"weights": "int8", "deterministic": True}
# Prompts that share beginnings of several lengths, none a multiple of a block.
TRUNK = [(7 * i + i * i // 5) % 96 for i in range(300)]
PROMPTS = [TRUNK[:300], [*TRUNK[:290], 3, 4], TRUNK[:131], TRUNK[:40] + TRUNK[50:120], [9], [9, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


def config(kind: str, num_blocks: int = 128, **changes: object) -> EngineConfig:
    token_bytes = 2 * 2 * 2 * 16 * ELEMENT_BYTES[kind]
    base = {"device": "cpu", "random_weights": True, "block_tokens": 16}
    base |= {"device_kv_bytes": num_blocks * 16 * token_bytes, **KINDS[kind], **changes}
    return EngineConfig(**base)  # type: ignore[arg-type]


def options(max_tokens: int) -> GenerateOptions:
    return GenerateOptions(max_tokens=max_tokens, ignore_eos=True, top_logprobs=3)


def bits(completion: Completion) -> list[tuple[object, ...]]:
    assert completion.logprobs is not None
    return [(one.token_id, one.logprob, one.top) for one in completion.logprobs]


async def alone(folder: Path, kind: str, prompt: list[int], max_tokens: int) -> Completion:
    """The result in an engine that has seen nothing else, prefilled in one chunk."""
    async with Engine(folder, config(kind)) as engine:
        return await engine.generate(prompt, options(max_tokens))


@pytest.fixture(scope="module", params=KINDS)
def expected(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[Completion]]:
    async def collect() -> list[Completion]:
        return [await alone(folder, request.param, prompt, 12) for prompt in PROMPTS]

    return request.param, asyncio.run(collect())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bits_are_the_cold_lone_ones(
    folder: Path, expected: tuple[str, list[Completion]], data: st.DataObject
) -> None:
    """Random concurrency, chunk sizes and pools that force eviction and preemption."""
    kind, cold = expected
    changes = {
        "step_tokens": data.draw(st.sampled_from([8, 23, 64, 512]), label="step_tokens"),
        "max_batch": data.draw(st.sampled_from([1, 3, 8]), label="max_batch"),
        "num_blocks": data.draw(st.sampled_from([26, 60, 128]), label="blocks"),
    }
    order = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=2, max_size=8))

    async def run() -> None:
        async with Engine(folder, config(kind, **changes)) as engine:
            for _ in range(2):  # the second round is warm
                runs = [engine.generate(PROMPTS[i], options(12)) for i in order]
                for i, done in zip(order, await asyncio.gather(*runs), strict=True):
                    assert bits(done) == bits(cold[i])
                await engine.check()

    asyncio.run(run())


async def test_a_continued_conversation_has_the_bits_of_a_cold_one(folder: Path) -> None:
    """KV written by decoding equals KV computed by prefill."""
    for kind in KINDS:
        async with Engine(folder, config(kind)) as engine:
            first = await engine.generate(TRUNK[:100], options(50))
            longer = [*TRUNK[:100], *first.token_ids, 5, 6]
            warm = await engine.generate(longer, options(12))
        assert warm.usage.cached_tokens["device"] == 149  # all but the last, never fed, token
        assert bits(warm) == bits(await alone(folder, kind, longer, 12))


async def test_samples_share_the_prompt_and_do_not_depend_on_each_other(folder: Path) -> None:
    sampling = GenerateOptions(max_tokens=8, temperature=1.0, seed=5, n=3, ignore_eos=True)
    async with Engine(folder, config("float32")) as engine:
        together = await engine.generate(TRUNK[:200], sampling)
        stats = engine.stats()
        one = GenerateOptions(max_tokens=8, temperature=1.0, seed=6, ignore_eos=True)
        second = await engine.generate(TRUNK[:200], one)
    assert together.others[0].token_ids == second.token_ids
    assert stats.computed_tokens == 200 + 2  # the prompt once, its last token for each other
    assert len({together.token_ids, *(other.token_ids for other in together.others)}) == 3
