"""Mixed steps on a GPU: what runs side by side gives the bits of one after the other."""

import json
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from gpu import needs_gpu

from agentrt.config import EngineConfig
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.attention_prefill import plan_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.mixed_graph import MAX_DECODE, Layout, MixedGraphs
from agentrt.models.llama import LlamaModel
from agentrt.models.load import load_model
from agentrt.step_device import CudaDevice
from agentrt.step_rows import MixedWork

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

CONTEXT, BLOCK_TOKENS, SLOTS = 4096, 64, 44
LONGEST_CHUNK, MOST_CHUNKS, MOST_ROWS = 300, 4, 40
SIZES = (64, 448, MOST_CHUNKS * LONGEST_CHUNK)
NUM_WORKS, VOCAB = 60, 4096
SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=[64, 128])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    dim = request.param
    path: Path = tmp_path_factory.mktemp("shape")
    shape = {**SHAPE, "head_dim": dim, "num_attention_heads": 2048 // dim}
    (path / "config.json").write_text(json.dumps(shape))
    return load_model(path, EngineConfig(device="cuda", random_weights=True)).model


def random_work(rng: np.random.Generator, dim: int) -> MixedWork:
    """Decode rows and chunks of requests that have a slot each."""
    num_decode, num_chunks = (int(rng.integers(1, most)) for most in (MOST_ROWS, MOST_CHUNKS + 1))
    positions = rng.integers(1, CONTEXT - LONGEST_CHUNK, num_decode + num_chunks)
    counts = rng.integers(2, LONGEST_CHUNK, num_chunks)
    slots, ends = np.arange(num_decode + num_chunks), np.cumsum(counts)
    tiles = [num_tiles(int(position), dim) for position in positions[:num_decode]]
    begins = list(
        zip(ends - counts, positions[num_decode:], counts, slots[num_decode:], strict=True)
    )
    outputs = np.concatenate([slots[:num_decode], num_decode + ends - 1])

    def ints(values: object) -> np.ndarray:
        return np.asarray(values, dtype=np.int32)

    return MixedWork(
        decode=(
            ints(rng.integers(0, VOCAB, num_decode)),
            ints(slots[:num_decode]),
            ints(positions[:num_decode]),
        ),
        prefill=(
            ints(rng.integers(0, VOCAB, ends[-1])),
            ints(np.repeat(slots[num_decode:], counts)),
            ints(np.concatenate([start + np.arange(count) for _, start, count, _ in begins])),
        ),
        starts=ints(np.cumsum([0, *tiles])),
        common=ints([0, 0]),
        chunks=[tuple(map(int, each)) for each in begins],
        outputs=(ints(outputs), ints(slots), ints(0 * slots), ints(0 * slots)),
    )


class Steps:
    """A pool, and mixed steps on it as graphs."""

    def __init__(self, model: LlamaModel, kv: torch.Tensor, scratch: Scratch) -> None:
        ops, device = model.ops, torch.device("cuda")
        assert isinstance(ops, CudaOps)
        self.kv, self.made = kv, {}
        blocks = CONTEXT // BLOCK_TOKENS
        order = torch.randperm(SLOTS * blocks, generator=torch.Generator().manual_seed(1))
        tables = torch.zeros(SLOTS + 1, blocks, dtype=torch.int32, device=device)
        tables[:SLOTS] = order.view(SLOTS, blocks)
        last_tokens = torch.zeros(SLOTS + 1, dtype=torch.int32, device=device)
        outbox = torch.zeros(MAX_DECODE, dtype=torch.int32, pin_memory=True)
        self.graphs = MixedGraphs(
            model, ops, kv, scratch, tables, last_tokens, outbox, SLOTS, CudaDevice()
        )

    @torch.inference_mode()
    def run(self, work: MixedWork) -> torch.Tensor:
        graphs, num_rows = self.graphs, len(work.prefill[0])
        rows = next(size for size in SIZES if size >= num_rows)
        layout = Layout.of(MAX_DECODE, rows, graphs.ops, graphs.model)
        geometry = graphs.model.geometry
        group = geometry.num_heads // geometry.num_kv_heads
        tiles = plan_tiles(work.chunks, group, layout.shape.rows)
        values = torch.from_numpy(layout.fill(work, tiles, SLOTS)).cuda()
        if rows not in self.made:
            flat = values.clone()
            self.made[rows] = flat, CudaDevice().capture(partial(graphs.compute, layout, flat))
        flat, captured = self.made[rows]
        flat.copy_(values)
        captured.replay()
        return captured.logits[: len(work.outputs[0])].clone()


def test_chunks_beside_decode_rows_give_the_bits_of_chunks_behind_them(model: LlamaModel) -> None:
    spec, rng = model.spec, np.random.default_rng(0)
    blocks = SLOTS * CONTEXT // BLOCK_TOKENS
    shape = (spec.num_layers, 2, blocks, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
    kv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    scratch = Scratch.allocate(
        model.geometry, vocab_size=VOCAB, max_batch=2 * MAX_DECODE, device=kv.device
    )
    assert scratch.side is not None
    beside = Steps(model, kv.clone(), scratch)
    behind = Steps(model, kv, attrs.evolve(scratch, side=None))
    for _ in range(NUM_WORKS):
        work = random_work(rng, spec.head_dim)
        got, expected = beside.run(work), behind.run(work)
        assert torch.equal(got, expected)
        assert got.isfinite().all()
    assert torch.equal(beside.kv, behind.kv)
