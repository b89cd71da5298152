"""deterministic=True on a GPU: bits, compared with torch.equal. What a row gives depends on nothing
but its own tokens and their positions."""

import asyncio
import json
import random
from pathlib import Path

import pytest
import torch
from attrs import define
from gpu import DEVICE, needs_gpu, relative_error
from test_gpu_engine import SHAPE

from agentrt import Completion, Engine, EngineConfig, GenerateOptions
from agentrt.errors import ConfigError
from agentrt.kernels import Segment
from agentrt.kernels.arithmetic import arithmetic_of
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.dispatch import choose_compute
from agentrt.kernels.reference import ReferenceOps
from agentrt.models.base import read_spec
from agentrt.models.llama import LlamaModel, expected_shapes

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

CONTEXT, BLOCK_TOKENS = 2112, 64
LENGTH = 2048
MODELS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "smollm2": {  # no chunk is whole: 576 columns
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}
Part = tuple[int, int]  # first position and number of rows, of the one context


def build(name: str, ops: CudaOps | ReferenceOps, dtype: torch.dtype) -> LlamaModel:
    spec = read_spec(MODELS[name])
    generator = torch.Generator(DEVICE).manual_seed(1)

    def tensors():
        for key, shape in expected_shapes(spec).items():
            drawn = torch.randn(shape, generator=generator, device=DEVICE)
            weight = drawn * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
            yield key, weight.bfloat16().to(dtype)

    with torch.inference_mode():
        return LlamaModel.build(spec, ops, tensors(), CONTEXT)


def pool(model: LlamaModel, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    spec = model.spec
    shape = (spec.num_layers, 2, CONTEXT // BLOCK_TOKENS, spec.num_kv_heads, BLOCK_TOKENS)
    return torch.zeros(*shape, spec.head_dim, dtype=dtype, device=DEVICE)


@define
class Case:
    """A model, a context, and what comes of it in one chunk."""

    model: LlamaModel
    tokens: torch.Tensor
    kv: torch.Tensor
    whole: torch.Tensor  # [LENGTH, vocab]

    @classmethod
    def of(cls, name: str, *, fp8: bool) -> "Case":
        model = build(name, CudaOps(DEVICE, fp8=fp8, deterministic=True), torch.bfloat16)
        generator = torch.Generator().manual_seed(2)
        vocab = model.spec.vocab_size
        tokens = torch.randint(vocab, (CONTEXT,), generator=generator).to(DEVICE)
        case = cls(model, tokens, pool(model), torch.empty(0))
        case.whole = case.forward(case.kv, [(0, LENGTH)])
        return case

    def forward(self, kv: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        """Logits of all rows; each part is a request of its own, and all have the same blocks."""
        segments, rows = [], 0
        for start, number in parts:
            segments.append(Segment(rows, number, start, tuple(range(CONTEXT // BLOCK_TOKENS))))
            rows += number
        positions = torch.cat([torch.arange(s, s + n) for s, n in parts]).to(DEVICE)
        everything = torch.arange(rows, device=DEVICE)
        with torch.inference_mode():
            return self.model.forward(
                self.tokens[positions], positions, tuple(segments), kv, everything
            )


@pytest.fixture(
    scope="module", params=[("llama", False), ("qwen3", False), ("smollm2", False), ("llama", True)]
)
def case(request: pytest.FixtureRequest) -> Case:
    name, fp8 = request.param
    return Case.of(name, fp8=fp8)


def positions_of(number: int, seed: int) -> list[int]:
    """Some of a context, with the places where tiles, splits and blocks end."""
    edges = [0, 1, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 2047]
    others = random.Random(seed).sample(range(LENGTH), 64)
    chosen = list(dict.fromkeys(edges[: number // 2] + others))[:number]
    random.Random(seed + 1).shuffle(chosen)
    return chosen


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    differ = (got != expected).any(-1).nonzero().flatten().tolist()
    assert torch.equal(got, expected), f"{what}: {len(differ)} rows differ, first {differ[:8]}"


def test_any_chunking_gives_the_same_logits_and_keys(case: Case) -> None:
    """Prefill of every size of tile, decode rows among them; and three times the same."""
    ragged = [1, 2, 63, 65, 1, 129, 300, 16, 17, 128, 600, 726]
    assert sum(ragged) == LENGTH
    for sizes in ([LENGTH], [64] * 32, ragged, ragged[::-1], [512] * 4, [100] * 20 + [48]):
        kv, parts, start = pool(case.model), [], 0
        for number in sizes:
            parts.append(case.forward(kv, [(start, number)]))
            start += number
        assert_same(torch.cat(parts), case.whole, sizes)
        assert torch.equal(kv, case.kv), sizes


def test_decoding_gives_what_prefill_does(case: Case) -> None:
    """Token by token behind a prefix: the logits, and the keys that a preempted request loses."""
    kv = pool(case.model)
    case.forward(kv, [(0, 1000)])
    for position in range(1000, 1100):
        assert_same(case.forward(kv, [(position, 1)]), case.whole[[position]], position)
    again = pool(case.model)
    case.forward(again, [(0, 1100)])
    assert torch.equal(kv, again)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 17, 33, 48, 64, 100])
def test_a_row_among_others_is_the_row_alone(case: Case, batch: int) -> None:
    """Decode rows in any order; several have a context that programs share, many have none."""
    for repeat in range(3):
        positions = positions_of(min(batch, 64), repeat)
        positions += positions[: batch - len(positions)]  # the same row twice, too
        logits = case.forward(case.kv, [(position, 1) for position in positions])
        assert_same(logits, case.whole[positions], positions)


def test_chunks_and_decode_rows_in_one_step(case: Case) -> None:
    parts = [(700, 1), (3, 1), (2047, 1), (256, 5), (0, 300), (1500, 64), (900, 17)]
    rows = [position for start, number in parts for position in range(start, start + number)]
    assert_same(case.forward(case.kv, parts), case.whole[rows], parts)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_a_graph_gives_what_launches_do(case: Case, batch: int) -> None:
    """With dependent launch, and idle rows behind those of the step."""
    ops, geometry, num = case.model.ops, case.model.geometry, max(1, batch - batch // 4)
    assert isinstance(ops, CudaOps)
    positions = positions_of(num, 5)
    ints = {"dtype": torch.int32, "device": DEVICE}
    starts = [0]
    for position in positions:
        starts.append(starts[-1] + num_tiles(position, geometry.head_dim))
    starts += [starts[-1]] * (batch - num)
    tables = torch.arange(CONTEXT // BLOCK_TOKENS, **ints).repeat(2, 1)
    tables[1] = 0
    where = torch.tensor(positions + [0] * (batch - num), **ints)
    token_ids = case.tokens[where.long()].int()
    token_ids[num:] = 7  # would be seen in the first block
    rows = Rows(
        token_ids=token_ids,
        slots=torch.tensor([0] * num + [1] * (batch - num), **ints),
        positions=where,
        tables=tables,
        last_tokens=torch.zeros(2, **ints),
    )
    scratch = Scratch.allocate(
        geometry, vocab_size=1, max_batch=64, device=DEVICE, deterministic=True
    )
    kv = case.kv.clone()
    with torch.inference_mode():
        step = ops.plan_decode(rows, torch.tensor(starts, **ints), kv, geometry, scratch)
        case.model.run(step)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = case.model.run(step)
        for _ in range(3):
            logits.zero_()
            graph.replay()
            assert_same(logits[:num], case.whole[positions], positions)
    assert torch.equal(kv, case.kv)


def test_logits_are_near_those_of_float32() -> None:
    case = Case.of("llama", fp8=False)
    wide = build("llama", ReferenceOps(DEVICE), torch.float32)
    reference = Case(wide, case.tokens, pool(wide, torch.float32), torch.empty(0))
    expected = reference.forward(reference.kv, [(0, 600)])
    assert relative_error(case.whole[:600], expected) < 2e-2


PROMPTS = [[(7 * i + i * i // 5 + 3 * k) % 2048 for i in range(20 + 37 * k)] for k in range(21)]
OPTIONS = GenerateOptions(max_tokens=48, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


def config(**changes: object) -> EngineConfig:
    base = {"device": "cuda", "random_weights": True, "max_batch": 32, "device_kv_bytes": 1 << 29}
    return EngineConfig(**(base | {"deterministic": True, "host_kv_bytes": 0} | changes))  # type: ignore[arg-type]


async def outputs(folder: Path, *, alone: bool, **changes: object) -> list[tuple[int, ...]]:
    async with Engine(folder, config(**changes)) as engine:
        asked = [engine.generate(prompt, OPTIONS) for prompt in PROMPTS]
        done: list[Completion] = []
        if alone:
            done += [await one for one in asked]
        else:
            done += await asyncio.gather(*asked)
        await engine.check()
        assert engine.stats().kernels == "triton (deterministic)"
    return [tuple(one.token_ids) for one in done]


async def test_an_engine_gives_the_same_tokens_alone_and_among_others(folder: Path) -> None:
    """Small steps and large, prefixes that are cached, evicted and recomputed, requests that are
    preempted; and with drafts, of which some are wrong."""
    alone = await outputs(folder, alone=True, speculation=False)
    assert len(set(alone)) > 15
    block_bytes = 16 * 3 * 2 * 2 * 128 * 2
    for changes in (
        {},
        {"speculation": False},
        {"step_tokens": 64},
        {"step_tokens": 2048},
        {"block_tokens": 16, "device_kv_bytes": 90 * block_bytes},
    ):
        assert await outputs(folder, alone=False, **changes) == alone, changes


async def test_what_is_cached_and_what_is_computed_again_are_the_same(folder: Path) -> None:
    prompt = [(11 * i + i * i // 7) % 2048 for i in range(3000)]
    async with Engine(folder, config()) as engine:
        cold = await engine.generate(prompt, OPTIONS)
        warm = await engine.generate(prompt, OPTIONS)
        longer = await engine.generate([*prompt, *cold.token_ids[:20]], OPTIONS)
    assert warm.token_ids == cold.token_ids
    assert longer.token_ids[:28] == cold.token_ids[20:]


def test_float32_is_refused_and_the_store_is_one_of_its_own(folder: Path) -> None:
    given = {"device": "cuda", "weights": "auto", "is_quantised": False, "cache_dir": folder}
    with pytest.raises(ConfigError, match="dtype"):
        choose_compute(dtype="float32", deterministic=True, **given)
    texts = {arithmetic_of(CudaOps(DEVICE, deterministic=d), DEVICE) for d in (False, True)}
    assert len(texts) == 2
