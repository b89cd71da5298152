"""The decode step of one launch for several rows: in the interpreter, phase by phase, against the
graph's own kernels; and compiled for sm_90."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from attrs import frozen
from gpu import DEVICE, HAS_GPU, interpreted, relative_error
from interpreted import step_device
from test_triton_persistent import LLAMA, QWEN2, QWEN3, tensors

from agentrt.decode_graph import DecodeGraphs, DecodeInputs, parts
from agentrt.decode_persistent import batch_step
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.persistent_batch_attention import fitting_capacity
from agentrt.kernels.persistent_batch_products import MAX_SPLITS, BatchTiles
from agentrt.kernels.persistent_batch_step import MOST_ROWS, BatchGrid, BatchStep
from agentrt.kernels.persistent_step import product_shapes
from agentrt.kernels.skinny import SkinnyTiles
from agentrt.models.base import read_spec
from agentrt.models.llama import LlamaModel

pytestmark = [*interpreted, pytest.mark.timeout(300)]

BLOCK_TOKENS, CONTEXT, BLOCKS_EACH = 16, 640, 41
IDLE, DRAWN = MOST_ROWS, 1  # a slot, and the row that does not take the largest logit
SHAPES = {
    "llama": LLAMA,
    "qwen2": {**QWEN2, "num_hidden_layers": 1},
    "qwen3": {**QWEN3, "num_hidden_layers": 1, "intermediate_size": 300},
}


@frozen
class Batch:
    """A model and the memory of its runner: as many slots as rows, and an idle one."""

    graphs: DecodeGraphs

    @classmethod
    def of(cls, shape: dict[str, object]) -> "Batch":
        spec, ops = read_spec(shape), CudaOps(DEVICE, pdl=False)
        model = LlamaModel.build(spec, ops, tensors(spec, torch.bfloat16), CONTEXT)
        blocks = MOST_ROWS * BLOCKS_EACH
        size = (spec.num_layers, 2, blocks, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(2))
        tables = torch.zeros(IDLE + 1, BLOCKS_EACH, dtype=torch.int32)
        tables[:IDLE] = order.view(MOST_ROWS, BLOCKS_EACH)
        scratch = Scratch.allocate(
            model.geometry, vocab_size=spec.vocab_size, max_batch=MOST_ROWS, device=DEVICE
        )
        return cls(
            DecodeGraphs(
                model,
                ops,
                torch.zeros(size, dtype=torch.bfloat16, device=DEVICE),
                scratch,
                DecodeInputs.allocate(MOST_ROWS, DEVICE, 3 * MOST_ROWS),
                tables.to(DEVICE),
                torch.zeros(IDLE + 1, dtype=torch.int32, device=DEVICE),
                step_device(),
            )
        )

    def prepare(self, positions: list[int | None], seed: int = 0) -> None:
        """A pool of random keys and values, and the next step's inputs in every buffer: rows at
        those positions, the last of which has its token on the device alone; None is an idle row.
        """
        graphs, width = self.graphs, MOST_ROWS
        generator = torch.Generator().manual_seed(seed)
        graphs.kv.copy_(torch.randn(graphs.kv.shape, generator=generator))
        vocab, dim = graphs.model.spec.vocab_size, graphs.model.spec.head_dim
        graphs.last_tokens.copy_(torch.arange(IDLE + 1) * 11 % vocab)
        rows = [row for row, position in enumerate(positions) if position is not None]
        flat = np.zeros(len(graphs.inputs.flat), dtype=np.int32)
        fields, starts, _, _ = parts(flat, width)
        fields[1] = IDLE
        fields[0, rows] = [-1 if row == rows[-1] else 7 * row + 3 for row in rows]
        fields[1, rows] = [(5 * row + 3) % MOST_ROWS for row in rows]
        fields[2, rows] = [positions[row] for row in rows]
        fields[3] = range(width)
        fields[4, DRAWN] = np.float32(0.8).view(np.int32)
        tiles = np.zeros(width, dtype=np.int32)
        tiles[rows] = [num_tiles(positions[row], dim) for row in rows]
        starts[1:] = tiles.cumsum()
        graphs.inputs.ring[:] = torch.from_numpy(flat)
        graphs.inputs.outbox.fill_(-1)

    def step(self, batch: int, grid: BatchGrid | None = None) -> BatchStep:
        return batch_step(self.graphs, batch, grid)

    def run(self, run: Callable[[], torch.Tensor], positions: list[int | None]) -> "Done":
        """A step from inputs that are always the same."""
        graphs = self.graphs
        self.prepare(positions)
        graphs.inputs.restart()
        before = graphs.kv.clone()
        logits = run().clone()
        assert int(graphs.inputs.step) == 1
        return Done(
            logits,
            graphs.kv.clone(),
            (graphs.kv != before).any(-1),
            graphs.inputs.outbox[0].tolist(),
            graphs.last_tokens.tolist()[:IDLE],
        )


@frozen
class Done:
    """What a step left behind."""

    logits: torch.Tensor
    kv: torch.Tensor
    changed: torch.Tensor  # cells of the pool
    tokens: list[int]
    last_tokens: list[int]


def same_tiles(monkeypatch: pytest.MonkeyPatch, step: BatchStep) -> None:
    """From now on the graph's products split K as the one launch does."""
    cuts = {
        (cut.tiles, shape[1]): SkinnyTiles(cut.splits, cut.columns, is_deep=False)
        for shape, cut in (
            (shape, BatchTiles.choose(*shape, step.grid.num_programs, step.grid.num_stages))
            for shape in product_shapes(step.weights, step.geometry).values()
        )
    }
    monkeypatch.setattr(SkinnyTiles, "choose", lambda tiles, columns: cuts[tiles, columns])


def check_alike(got: Done, expected: Done, rows: list[int]) -> None:
    """Bit by bit, but for one sum on a GPU: the embedding's squares are added by other warps."""
    assert expected.logits[rows].isfinite().all()
    assert torch.equal(got.changed, expected.changed)
    if HAS_GPU:
        assert relative_error(got.logits[rows], expected.logits[rows]) < 0.005
        assert relative_error(got.kv, expected.kv) < 0.001
    else:
        assert torch.equal(got.logits[rows], expected.logits[rows])
        assert torch.equal(got.kv, expected.kv)
        assert got.last_tokens == expected.last_tokens
    greedy = [row for row in rows if row != DRAWN]
    assert [got.tokens[row] for row in greedy] == got.logits[greedy].argmax(-1).tolist()


CASES = {
    # An empty context, and the end of a block.
    "two": ("llama", [0, 31]),
    # Several units of a row, and rows that share programs; an idle row between the others.
    "four": ("llama", [620, 5, None, 300]),
    # More units than programs; biases, and sums of splits.
    "eight": ("qwen2", [0, 31, 500, 300, 15, None, None, None]),
    # Norms of heads, an odd number of them, and widths that no tile divides.
    "odd": ("qwen3", [140, 16, 130, None]),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Batch]:
    return {name: Batch.of(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_bits_are_those_of_the_graph_that_splits_alike(
    name: str, cases: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, positions = CASES[name]
    case, batch = cases[shape], len(positions)
    alive = [row for row, position in enumerate(positions) if position is not None]
    step = case.step(batch)
    same_tiles(monkeypatch, step)
    expected, got = (
        case.run(run, positions)
        for run in (partial(case.graphs.compute, batch), step.launch_in_pieces)
    )
    check_alike(got, expected, alive)
    assert int(expected.changed.sum()) == len(alive) * case.graphs.kv[:, :, 0, :, 0, 0].numel()
    assert got.tokens[batch:] == expected.tokens[batch:] == [-1] * (len(got.tokens) - batch)
    counters = (step.memory.products.counters, step.work.counters, step.sampling[2])
    assert not any(counter.any() for counter in counters)


def test_units_fill_one_round_of_programs_where_they_can() -> None:
    """Else as many rounds as it takes; and no unit is longer than it has to be."""
    for positions, programs, kv_heads in (
        ([1024] * 8, 264, 8),
        ([1000, 5000, 16384, 3, 700], 264, 8),
        ([16384] * 8, 264, 8),
        ([100, 9000], 264, 32),
        ([600] * 8, 4, 2),
    ):
        tiles = [num_tiles(position, 64) for position in positions]
        starts = torch.tensor([0, *itertools.accumulate(tiles)], dtype=torch.int32, device=DEVICE)
        found = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        capacity_kernel[(1,)](starts, found, len(tiles), kv_heads, programs)
        capacity, num_items = found.tolist()
        each = max(1, -(-sum(tiles) * kv_heads // capacity))
        assert num_items == kv_heads * sum(-(-number // each) for number in tiles)
        if len(tiles) * kv_heads <= programs:
            assert num_items <= programs
        whole = max(1, -(-sum(tiles) * kv_heads // programs))
        fits = kv_heads * sum(-(-number // whole) for number in tiles) <= programs
        assert (each == whole) == (fits or len(tiles) * kv_heads >= programs)


@triton.jit
def capacity_kernel(starts, found, batch, KV_HEADS: tl.constexpr, PROGRAMS: tl.constexpr):
    capacity, num_items = fitting_capacity(starts, batch, KV_HEADS, 16, PROGRAMS)
    tl.store(found, capacity)
    tl.store(found + 1, num_items)


@pytest.mark.parametrize("kind", [STORE, ADD, GATE_UP])
def test_splits_divide_the_columns_evenly(kind: int) -> None:
    for rows, columns in ((3072, 2048), (4096, 14336), (200, 80), (512, 512), (2560, 9728)):
        cut = BatchTiles.choose(rows, columns, kind, 264, 4)
        assert 1 <= cut.splits <= MAX_SPLITS
        assert cut.splits == 1 or columns % (cut.splits * cut.columns) == 0
    assert BatchTiles.choose(128256, 2048, STORE, 264, 4).splits == 1
    assert BatchTiles.choose(2048, 8192, ADD, 264, 4).items == 256


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = str(Path(__file__).parent / "compile_persistent.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, "batch", shape],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shape in ("1b", "qwen3")
    ]
    found: dict[str, dict[str, object]] = {}
    for one in running:
        out, errors = one.communicate()
        assert one.returncode == 0, errors[-2000:]
        found |= json.loads(out)
    return found


def test_nothing_spills_and_two_programs_fit(kernels: dict[str, dict[str, object]]) -> None:
    assert set(kernels) == {"1b", "qwen3"}
    for name, kernel in kernels.items():
        assert kernel["stack"] == kernel["local"] == 0, name
        assert kernel["shared"] + 1024 <= 233_472 // 2, name  # type: ignore[operator]


def test_products_run_on_the_tensor_cores_that_the_graph_uses(
    kernels: dict[str, dict[str, object]],
) -> None:
    for name, kernel in kernels.items():
        layouts, ptx = str(kernel["layouts"]), str(kernel["ptx"])
        assert "versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1]" in layouts, name
        assert "m64n16k16.f32.bf16" in ptx, name
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", ptx)
        assert copies, name
        assert ".ca.shared" not in ptx or copies.count("0x10") > 200, name


def test_stores_are_published_before_a_program_announces(
    kernels: dict[str, dict[str, object]],
) -> None:
    """Triton puts no barrier of its own before a scalar atomic."""
    for name, kernel in kernels.items():
        functions, releases = re.split(r"^\.func|^\s*\.entry", str(kernel["ptx"]), flags=re.M), 0
        for function in functions:
            lines = function.splitlines()
            for at, line in enumerate(lines):
                if re.search(r"atom\S*\.(release|acq_rel)", line):
                    releases += 1
                    barrier = max(i for i in range(at) if "bar.sync" in lines[i])
                    stores = [i for i in range(at) if "st.global" in lines[i]]
                    assert max(stores, default=-1) < barrier, name
        # A barrier a phase, and the last arrivers: of attention, of sampling, of products.
        splits = sum(v > 1 for n, v in kernel["tiles"].items() if n.endswith("_SPLITS"))  # type: ignore[attr-defined]
        assert releases == 8 + 2 + splits, name


def test_weights_are_on_their_way_before_the_barrier_is_complete(
    kernels: dict[str, dict[str, object]],
) -> None:
    """Between each product's announcement and its first poll: prefetches, and nothing that an
    earlier phase has made."""
    for name, kernel in kernels.items():
        ptx, found = str(kernel["ptx"]), 0
        for part in re.split(r"atom\S*\.release", ptx)[1:]:
            between = re.split(r"ld\.global\.gpu\.acquire|ld\.acquire", part)[0]
            found += "cp.async.bulk.prefetch" in between
            assert "cp.async.c" not in between.replace("cp.async.commit", ""), name
        assert found == 6, name  # five products, and attention
