"""Steps of the CUDA path: their host side, and their kernels (interpreted without a GPU)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import make_request, resolved
from gpu import DEVICE, interpreted
from interpreted import step_device

from agentrt.cache import PrefixCache
from agentrt.config import EngineConfig
from agentrt.cuda_inputs import BlockTables
from agentrt.cuda_runner import CudaRunner, CudaTicket
from agentrt.decode_graph import FIELDS, DecodeGraphs, DecodeInputs
from agentrt.kernels import Segment
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.attention_prefill import plan_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.mixed_graph import MAX_DECODE, TOTAL_ROWS, Layout, MixedGraphs, buckets
from agentrt.models.llama import LlamaModel, expected_shapes
from agentrt.models.load import load_model
from agentrt.scheduler import Scheduler
from agentrt.step_rows import MixedWork

pytestmark = interpreted

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BLOCKS, BLOCK_TOKENS, WIDTH = 24, 16, 4
IDLE = 4  # slots 0 to 3 are for requests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    config = EngineConfig(device="cpu", dtype="bfloat16", random_weights=True)
    plain = load_model(Path(path), config).model
    ops = CudaOps(DEVICE, pdl=DEVICE.type == "cuda")

    def tensors():
        generator = torch.Generator().manual_seed(1)
        for name, shape in expected_shapes(plain.spec).items():
            weight = torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1)
            yield name, weight.to(DEVICE, torch.bfloat16)

    return LlamaModel.build(plain.spec, ops, tensors(), 512)


class Memory:
    """What a CudaRunner owns, for a model this small."""

    def __init__(self, model: LlamaModel) -> None:
        self.model = model
        self.kv = torch.zeros(
            2, 2, BLOCKS, 2, BLOCK_TOKENS, 16, dtype=torch.bfloat16, device=DEVICE
        )
        self.tables = torch.zeros(IDLE + 1, 8, dtype=torch.int32, device=DEVICE)
        self.last_tokens = torch.zeros(IDLE + 1, dtype=torch.int32, device=DEVICE)
        self.tokens = torch.zeros(64, dtype=torch.int32, device=DEVICE)
        self.scratch = Scratch.allocate(model.geometry, vocab_size=96, max_batch=64, device=DEVICE)

    def place(self, slot: int, ids: list[int]) -> None:
        self.tables[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)

    def mixed(self) -> MixedGraphs:
        ops = self.model.ops
        assert isinstance(ops, CudaOps)
        return MixedGraphs(
            self.model,
            ops,
            self.kv,
            self.scratch,
            self.tables,
            self.last_tokens,
            self.tokens,
            IDLE,
            step_device(),
        )


def expected_logits(model: LlamaModel, tokens: list[int]) -> torch.Tensor:
    """Of all tokens, computed as one chunk."""
    blocks = tuple(range(len(tokens) // BLOCK_TOKENS + 1))
    kv = torch.zeros(2, 2, len(blocks), 2, BLOCK_TOKENS, 16, dtype=torch.bfloat16, device=DEVICE)
    ids, rows = torch.tensor(tokens, device=DEVICE), torch.arange(len(tokens), device=DEVICE)
    with torch.inference_mode():
        return model.forward(ids, rows, (Segment(0, len(tokens), 0, blocks),), kv, rows)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_mixed_then_decode(model: LlamaModel) -> None:
    """Two chunks are prefilled; then one decodes beside the other's next chunk; then both decode,
    one from a token that only the device knows."""
    first, second = list(range(3, 40)), list(range(60, 85))
    memory = Memory(model)
    memory.place(0, [5, 2, 9])
    memory.place(3, [1, 7])
    graphs = memory.mixed()
    zeros = ints(0, 0)
    work = MixedWork(
        decode=(ints(), ints(), ints()),
        prefill=(
            ints(*first, *second[:20]),
            np.repeat(ints(0, 3), [37, 20]),
            np.concatenate([np.arange(37), np.arange(20)]).astype(np.int32),
        ),
        starts=ints(0),
        common=ints(0, 0),
        chunks=[(0, 0, 37, 0), (37, 0, 20, 3)],
        outputs=(ints(36), ints(0), zeros[:1], zeros[:1]),
    )
    logits = compute(graphs, work, 0)
    expected = expected_logits(model, first)
    torch.testing.assert_close(logits[0], expected[-1], rtol=0.05, atol=0.1)
    token = int(memory.tokens[0])
    assert token == int(logits[0].argmax()) == int(memory.last_tokens[0])
    work = MixedWork(
        decode=(ints(-1), ints(0), ints(37)),
        prefill=(ints(*second[20:]), ints(3, 3, 3, 3, 3), np.arange(20, 25, dtype=np.int32)),
        starts=ints(0, 1),
        common=ints(0, 0),
        chunks=[(0, 20, 5, 3)],
        outputs=(ints(0, 5), ints(0, 3), zeros, zeros),
    )
    logits = compute(graphs, work, 64)
    torch.testing.assert_close(
        logits[0], expected_logits(model, [*first, token])[-1], rtol=0.05, atol=0.1
    )
    torch.testing.assert_close(logits[1], expected_logits(model, second)[-1], rtol=0.05, atol=0.1)
    decode(memory, [*first, token], second)


def compute(graphs: MixedGraphs, work: MixedWork, num_decode: int) -> torch.Tensor:
    layout = Layout.of(num_decode, 64, graphs.ops, graphs.model)
    tiles = plan_tiles(work.chunks, 2, layout.shape.rows)
    flat = torch.from_numpy(layout.fill(work, tiles, IDLE)).to(DEVICE)
    with torch.inference_mode():
        return graphs.compute(layout, flat)


def decode(memory: Memory, first: list[int], second: list[int]) -> None:
    inputs = DecodeInputs.allocate(WIDTH, DEVICE, WIDTH)
    graphs = DecodeGraphs(
        memory.model,
        memory.model.ops,
        memory.kv,
        memory.scratch,
        inputs,
        memory.tables,
        memory.last_tokens,
        step_device(),
    )
    given = {"token_ids": [-1, -1], "slots": [0, 3], "positions": [len(first), len(second)]}
    tokens = [int(memory.last_tokens[slot]) for slot in given["slots"]]
    assert num_tiles(len(first), 16) == 1
    flat = ints(*[0] * WIDTH, *[IDLE] * WIDTH, *[0] * (3 * WIDTH), 0, 1, 2, 2, 2)
    flat = np.concatenate([flat, ints(0, 0, 2 * WIDTH)])  # nothing in common; the outbox
    for index, name in enumerate(FIELDS[:3]):
        flat[index * WIDTH : index * WIDTH + 2] = given[name]
    inputs.write(np.full_like(flat, IDLE))  # of a step before
    inputs.write(flat)
    inputs.step.fill_(1)
    before = memory.kv[:, :, 0].clone()
    with torch.inference_mode():
        logits = graphs.compute(WIDTH)
    for row, (known, token) in enumerate(zip((first, second), tokens, strict=True)):
        expected = expected_logits(memory.model, [*known, token])[-1]
        torch.testing.assert_close(logits[row], expected, rtol=0.05, atol=0.1)
        assert int(inputs.outbox[2, row]) == int(logits[row].argmax())
    assert int(inputs.step) == 2
    assert torch.equal(memory.kv[:, :, 0], before), "an idle row wrote to the pool"


def test_block_tables_follow_their_leases() -> None:
    config = resolved(num_blocks=20, max_batch=3)
    scheduler = Scheduler(config, PrefixCache(20, config.block_tokens))
    tables = BlockTables(3, 16, torch.device("cpu"))
    mirror = np.zeros(4 * 16, dtype=np.int32)
    requests = [make_request([i + 1] * (3 + i), 6) for i in range(3)]
    for request in requests:
        scheduler.submit(request)
    for now in range(9):
        plan = scheduler.plan(float(now))
        if not plan.work:
            break
        slots, cells, blocks = tables.place(plan.work)
        assert len(set(slots)) == len(slots)
        mirror[cells] = blocks
        for work, slot in zip(plan.work, slots, strict=True):
            ids = work.request.lease.block_ids
            assert mirror[slot * 16 : slot * 16 + len(ids)].tolist() == ids
            scheduler.computed(work, float(now))
            if work.samples:
                work.request.append(5)
        if now == 3:
            scheduler.finish(requests[0], float(now))
            scheduler.submit(make_request([9] * 9, 6))
    assert now > 4


def test_a_step_without_a_token_is_waited_for_too() -> None:
    """Else a long prompt's steps would run ahead of the buffers that their inputs are in."""
    waited = []

    class Done:
        def synchronize(self) -> None:
            waited.append(True)

    none = torch.zeros(0)
    ticket = CudaTicket(sampling=(), runs_ahead=True, tokens=none, logits=none, done=Done())
    runner = SimpleNamespace(graphs=SimpleNamespace(check=lambda: None))
    assert CudaRunner.collect(runner, ticket) == []
    assert waited


def test_inputs_go_round_a_ring() -> None:
    inputs = DecodeInputs.allocate(2, torch.device("cpu"), 2)
    for step in range(4):
        inputs.write(np.full(len(inputs.flat), step, dtype=np.int32))
    assert inputs.ring[:, 0].tolist() == [3, 1, 2]
    inputs.step.fill_(4)
    inputs.restart()
    inputs.write(np.full(len(inputs.flat), 9, dtype=np.int32))
    assert inputs.ring[0, 0] == 9
    assert inputs.step == 0


@pytest.mark.parametrize("step_tokens", [48, 64, 500, 2048, 3000])
def test_buckets_grow_and_the_last_holds_a_whole_step(step_tokens: int) -> None:
    found = buckets(step_tokens)
    assert found == sorted(set(found))
    for num_decode in (0, MAX_DECODE):
        sizes = [rows for decode, rows in found if decode == num_decode]
        assert sizes[-1] == max(step_tokens, 64)
        assert {num_decode + rows for rows in sizes[:-1]} <= {*TOTAL_ROWS, 16, 32}
