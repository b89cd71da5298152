"""The decode step of one launch on a GPU: its barriers, its bits, and a whole engine with it."""

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from gpu import DEVICE, needs_gpu, relative_error
from test_gpu_engine import PROMPTS, SHAPE, config, float32_logits
from test_triton_persistent import LLAMA, SLOT, Case
from test_triton_persistent_batch import Batch, check_alike, same_tiles

from agentrt import Engine, GenerateOptions
from agentrt.kernels import cuda_attention
from agentrt.kernels.attention_decode import decode_attention, num_tiles
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.gemv import GemvTiles
from agentrt.kernels.persistent_products import PersistentTiles
from agentrt.kernels.persistent_step import NUM_WARPS, PersistentStep

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

# Wide enough that every program has work, and that items go round more than once.
WIDE = {
    **LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 9000,
}
SHAPES = {
    "llama": WIDE,
    # Norms of heads, and a width that no tile divides.
    "qwen3": {
        **WIDE,
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 2200,
    },
}
POSITIONS = (0, 31, 255, 620)


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with torch.inference_mode():
        yield Case.of(SHAPES[request.param])


def prepare(case: Case, position: int) -> None:
    """A pool of random keys and values, and the step's inputs in every buffer."""
    generator = torch.Generator(device=DEVICE).manual_seed(position)
    case.kv.normal_(generator=generator)
    tiles = num_tiles(position, case.model.spec.head_dim)
    values = torch.tensor([7, SLOT, position, 0, 0, 0, tiles, 2], dtype=torch.int32)
    case.ring[:] = values.to(DEVICE)


def graph_logits(case: Case, step: PersistentStep) -> torch.Tensor:
    """Of the graph's kernels, with the tiles and warps of the one launch."""
    inputs, geometry = step.inputs, case.model.geometry
    inputs.flat.copy_(case.ring[0])
    kv_heads = geometry.num_kv_heads
    decode = attrs.evolve(
        case.scratch.decode, num_programs=step.grid.num_programs // kv_heads * kv_heads
    )
    rows = Rows(
        token_ids=inputs.token_ids,
        slots=inputs.slots,
        positions=inputs.positions,
        tables=inputs.tables,
        last_tokens=inputs.last_tokens,
    )
    scratch = attrs.evolve(case.scratch, decode=decode)
    ops = case.model.ops
    planned = ops.plan_decode(rows, inputs.starts, case.kv, geometry, scratch)  # type: ignore[attr-defined]
    return case.model.run(planned)


@pytest.mark.parametrize("position", POSITIONS)
def test_bits_are_those_of_the_graph_with_the_same_tiles(
    case: Case, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = case.persistent()

    def choose(num_rows: int, num_columns: int, kind: int) -> GemvTiles:
        grid = step.grid
        cut = PersistentTiles.choose(
            num_rows, num_columns, kind, grid.num_programs, grid.most_numbers
        )
        return GemvTiles(cut.rows, cut.columns, NUM_WARPS)

    monkeypatch.setattr(GemvTiles, "choose", choose)
    attention = partial(decode_attention, num_warps=NUM_WARPS)
    monkeypatch.setattr(cuda_attention, "decode_attention", attention)
    found, pools = [], []
    for run in (partial(graph_logits, case, step), step.launch_in_pieces, step.launch, step.launch):
        prepare(case, position)
        found.append(run().clone())
        pools.append(case.kv.clone())
    assert not step.has_failed
    assert found[0].isfinite().all()
    for name, logits, pool in zip(("pieces", "launch", "again"), found[1:], pools[1:], strict=True):
        assert torch.equal(logits, found[0]), f"{name}: {relative_error(logits, found[0])}"
        assert torch.equal(pool, pools[0]), name


def test_ten_thousand_steps_are_all_the_same(case: Case) -> None:
    """Captured, one behind the other, as an engine launches them."""
    step = case.persistent()
    prepare(case, 400)
    expected = step.launch().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    wrong = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    before = int(case.step)
    for _ in range(10_000):
        graph.replay()
        wrong += (step.memory.logits != expected).any()
    assert int(wrong) == 0
    assert not step.has_failed
    assert int(case.step) == before + 10_000
    assert int(step.memory.barrier) & 0x7FFFFFFF == 0
    assert not case.scratch.decode.counters.any()


@pytest.fixture(scope="module", params=SHAPES)
def batch(request: pytest.FixtureRequest) -> Iterator[Batch]:
    with torch.inference_mode():
        yield Batch.of(SHAPES[request.param])


@pytest.mark.parametrize(
    "positions",
    [[31, 620], [255, 0, None, 300], [620, 0, 31, 130, 500, None, None, 7], [639] * 8],
)
def test_several_rows_in_one_launch_equal_the_graph(
    batch: Batch, positions: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one launch the same launch again, and the same in pieces, bit by bit."""
    num_rows, alive = len(positions), [row for row, at in enumerate(positions) if at is not None]
    step = batch.step(num_rows)
    same_tiles(monkeypatch, step)
    expected = batch.run(partial(batch.graphs.compute, num_rows), positions)
    pieces, *launches = (
        batch.run(run, positions) for run in (step.launch_in_pieces, step.launch, step.launch)
    )
    assert not step.has_failed
    check_alike(pieces, expected, alive)
    for launch in launches:
        assert torch.equal(launch.logits[alive], pieces.logits[alive])
        assert torch.equal(launch.kv, pieces.kv)
        assert [launch.tokens[row] for row in alive] == [pieces.tokens[row] for row in alive]


def test_thousands_of_steps_of_several_rows_are_all_the_same(batch: Batch) -> None:
    step = batch.step(8)
    batch.prepare([620, 0, 31, 130, 500, 255, 300, 7])
    batch.graphs.inputs.ring[:, 7] = 3  # a token that does not depend on the step before
    expected = step.launch().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    wrong = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    before = int(batch.graphs.inputs.step)
    for _ in range(3000):
        graph.replay()
        wrong += (step.logits != expected).any()
    assert int(wrong) == 0
    assert not step.has_failed
    assert int(batch.graphs.inputs.step) == before + 3000
    assert int(step.memory.barrier) & 0x7FFFFFFF == 0
    counters = (step.memory.products.counters, step.work.counters, step.sampling[2])
    assert not any(counter.any() for counter in counters)


def test_more_programs_than_there_is_room_for_are_refused(case: Case) -> None:
    """And not waited for by those that have room."""
    step = case.persistent()
    grid = attrs.evolve(step.grid, num_programs=64 * step.grid.num_programs)
    with pytest.raises(RuntimeError):
        attrs.evolve(step, grid=grid).launch()
    prepare(case, 31)
    assert step.launch().isfinite().all()  # the device works on


async def test_an_engine_says_how_it_launches_and_draws_what_float32_would(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    options = GenerateOptions(max_tokens=24, ignore_eos=True)
    async with Engine(tmp_path, config(decode_launch="persistent")) as engine:
        assert "one launch" in engine.stats().kernels
        done = [await engine.generate(prompt, options) for prompt in PROMPTS[::9]]
        beside = await asyncio.gather(*(engine.generate(p, options) for p in PROMPTS[:3]))
        await engine.check()
    for prompt, one in zip([*PROMPTS[::9], PROMPTS[1]], [*done, beside[1]], strict=True):
        tokens = [*prompt, *one.token_ids]
        logits = (await asyncio.to_thread(float32_logits, tmp_path, tokens))[len(prompt) - 1 : -1]
        got = logits.gather(1, torch.tensor(one.token_ids, device=DEVICE)[:, None])[:, 0]
        assert (logits.max(-1).values - got).max() < 0.1 * logits.std()
