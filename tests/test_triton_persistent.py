"""The decode step of one launch: phase by phase in the interpreter, and compiled for sm_90."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from attrs import frozen
from gpu import DEVICE, interpreted, relative_error

from agentrt.decode_persistent import persistent_weights
from agentrt.kernels import Segment
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.persistent_grid import announce, await_all
from agentrt.kernels.persistent_products import PersistentTiles
from agentrt.kernels.persistent_step import (
    PersistentGrid,
    PersistentInputs,
    PersistentMemory,
    PersistentStep,
)
from agentrt.kernels.reference import ReferenceOps
from agentrt.models.base import read_spec
from agentrt.models.llama import LlamaModel, expected_shapes

pytestmark = [*interpreted, pytest.mark.timeout(300)]

BLOCKS, BLOCK_TOKENS, CONTEXT = 40, 16, 640
SLOT, IDLE = 2, 4
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Biases, and a width of six tiles; norms of heads, an odd number of them, and widths that no tile
# divides.
QWEN2 = {
    **LLAMA,
    "model_type": "qwen2",
    "intermediate_size": 1536,
}
QWEN3 = {
    **LLAMA,
    "model_type": "qwen3",
    "hidden_size": 80,
    "intermediate_size": 2200,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
SHAPES = {"qwen2": QWEN2, "qwen3": QWEN3}


def tensors(spec, dtype):
    """The same random weights, which bf16 holds exactly, in either dtype."""
    generator = torch.Generator().manual_seed(1)
    for name, shape in expected_shapes(spec).items():
        is_norm = len(shape) == 1 and "norm" in name
        weight = torch.randn(shape, generator=generator) * (1 if is_norm else shape[-1] ** -0.5)
        yield name, weight.bfloat16().to(DEVICE, dtype)


@frozen
class Case:
    """A model twice, and the memory of a runner."""

    model: LlamaModel
    wide: LlamaModel  # of plain torch in float32
    kv: torch.Tensor
    tables: torch.Tensor
    last_tokens: torch.Tensor
    flat: torch.Tensor
    ring: torch.Tensor
    outbox: torch.Tensor
    step: torch.Tensor
    scratch: Scratch

    @classmethod
    def of(cls, shape: dict[str, object]) -> "Case":
        spec = read_spec(shape)
        model, wide = (
            LlamaModel.build(spec, ops, tensors(spec, dtype), CONTEXT)
            for ops, dtype in (
                (CudaOps(DEVICE, pdl=False), torch.bfloat16),
                (ReferenceOps(DEVICE), torch.float32),
            )
        )

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=DEVICE)

        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2))
        tables = ints(IDLE + 1, BLOCKS)
        tables[SLOT] = order.int()
        size = (spec.num_layers, 2, BLOCKS, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
        return cls(
            model,
            wide,
            torch.zeros(size, dtype=torch.bfloat16, device=DEVICE),
            tables,
            ints(IDLE + 1),
            ints(8),
            ints(3, 8),
            ints(6),
            ints(1),
            Scratch.allocate(
                model.geometry, vocab_size=spec.vocab_size, max_batch=4, device=DEVICE
            ),
        )

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """The last token's logits, and the pool filled with what is before it."""
        block_ids = tuple(self.tables[SLOT].tolist())
        kv, rows = self.kv.float(), torch.arange(len(tokens), device=DEVICE)
        ids = torch.tensor(tokens, device=DEVICE)
        segments = (Segment(0, len(tokens), 0, block_ids),)
        with torch.inference_mode():
            logits = self.wide.forward(ids, rows, segments, kv, rows[-1:])
        last = len(tokens) - 1
        kv[:, :, block_ids[last // BLOCK_TOKENS], :, last % BLOCK_TOKENS] = 7.0  # not written yet
        self.kv.copy_(kv)
        return logits

    def persistent(self) -> PersistentStep:
        weights = persistent_weights(self.model, DEVICE)
        parts = {
            name: self.flat[at : at + 1]
            for at, name in enumerate(("token_ids", "slots", "positions", "seeds"))
        }
        inputs = PersistentInputs(
            ring=self.ring,
            step=self.step,
            flat=self.flat,
            **parts,
            temperatures=self.flat[4:5].view(torch.float32),
            starts=self.flat[5:7],
            place=self.flat[7:8],
            tables=self.tables,
            last_tokens=self.last_tokens,
            outbox=self.outbox,
        )
        return PersistentStep(
            weights=weights,
            geometry=self.model.geometry,
            inputs=inputs,
            kv=self.kv,
            work=self.scratch.decode,
            sampling=self.scratch.sample,
            memory=PersistentMemory.allocate(self.model.geometry, weights, DEVICE),
            grid=PersistentGrid.choose(DEVICE, self.model.geometry.head_dim),
        )

    def write(self, token: int, slot: int, position: int, tiles: int, place: int) -> None:
        """Hand over the next step's inputs, where it will look for them."""
        values = [token, slot, position, 0, 0, 0, tiles, place]
        self.ring.fill_(99)
        self.ring[int(self.step) % 3] = torch.tensor(values, dtype=torch.int32)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(LLAMA)


# An empty context; the end of a block; several units, so that programs share a row.
@pytest.mark.parametrize("position", [0, 31, 620])
def test_a_step_equals_the_reference(case: Case, position: int) -> None:
    check_step(case, position)


@pytest.mark.parametrize("shape", ["qwen2", "qwen3"])
def test_steps_of_other_shapes_equal_the_reference(shape: str) -> None:
    check_step(Case.of(SHAPES[shape]), 300)


def check_step(case: Case, position: int) -> None:
    vocab, dim = case.model.spec.vocab_size, case.model.spec.head_dim
    tokens = [(7 * i + i * i // 5 + 3) % vocab for i in range(position + 1)]
    expected = case.expected(tokens)
    case.write(tokens[-1], SLOT, position, num_tiles(position, dim), 2)
    steps, before = int(case.step), case.kv.clone()
    logits = case.persistent().launch_in_pieces()
    assert relative_error(logits, expected) < 0.02
    token = int(logits[0].argmax())
    assert int(case.outbox[2]) == int(case.last_tokens[SLOT]) == token
    assert int(case.step) == steps + 1
    block = int(case.tables[SLOT, position // BLOCK_TOKENS])
    changed = (case.kv != before).any(-1).nonzero()
    assert set(changed[:, 2].tolist()) == {block}
    assert set(changed[:, 4].tolist()) == {position % BLOCK_TOKENS}
    assert len(changed) == case.kv.shape[0] * 2 * case.kv.shape[3]  # every layer and head
    assert not case.scratch.decode.counters.any()


def test_the_next_step_begins_with_the_token_that_the_last_one_drew(case: Case) -> None:
    """Its id is on the device alone; so the second step equals one of all tokens."""
    tokens = [5, 9, 2, 14, 3]
    case.expected(tokens)
    step = case.persistent()
    case.write(tokens[-1], SLOT, 4, 1, 0)
    step.launch_in_pieces()
    case.write(-1, SLOT, 5, 1, 3)
    logits = step.launch_in_pieces().clone()
    expected = case.expected([*tokens, int(case.outbox[0])])
    assert relative_error(logits, expected) < 0.02
    assert int(case.outbox[3]) == int(logits[0].argmax())


def test_an_idle_row_leaves_the_pool_alone(case: Case) -> None:
    case.expected([1, 2, 3])
    before = case.kv.clone()
    case.write(0, IDLE, 0, 0, 1)
    case.persistent().launch_in_pieces()
    assert torch.equal(case.kv, before)


@pytest.mark.parametrize("numbers", [64, 2048, 16384])
@pytest.mark.parametrize("kind", [STORE, ADD, GATE_UP])
def test_tiles_hold_no_more_than_they_may(kind: int, numbers: int) -> None:
    for rows, columns in ((3072, 2048), (4096, 14336), (200, 80), (512, 512), (2560, 9728)):
        tiles = PersistentTiles.choose(rows, columns, kind, 132, numbers)
        assert tiles.columns & (tiles.columns - 1) == tiles.rows & (tiles.rows - 1) == 0
        both = 2 if kind == GATE_UP else 1
        assert tiles.rows == 1 or both * tiles.rows * tiles.columns <= numbers


def test_tiles_leave_few_programs_idle() -> None:
    """1B and 8B shapes on an H100: at most one program in twenty waits at a phase's end."""
    for hidden, width, qkv in ((2048, 8192, 3072), (4096, 14336, 6144)):
        for rows, columns, kind in (
            (qkv, hidden, STORE),
            (hidden, hidden, ADD),
            (width, hidden, GATE_UP),
            (hidden, width, ADD),
            (128256, hidden, STORE),
        ):
            tiles = PersistentTiles.choose(rows, columns, kind, 132, 16384)
            items = -(-rows // tiles.rows)
            assert items / (-(-items // 132) * 132) > 0.95
            assert columns % tiles.columns == 0


@triton.jit
def announce_kernel(barrier, seen, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    tl.store(seen + program, announce(barrier, program, PROGRAMS))


@triton.jit
def await_kernel(barrier, failed, left, seen, polls):
    tl.store(left, await_all(barrier, seen, polls, failed))


@pytest.mark.parametrize("programs", [2, 7, 264])
def test_the_barrier_turns_over_and_never_overflows(programs: int) -> None:
    barrier = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    seen = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
    for turn in range(5):
        announce_kernel[(programs,)](barrier, seen, programs)
        is_up = turn % 2 == 0
        assert int(barrier) == (-(2**31) if is_up else 0)
        assert bool(((seen < 0) == (not is_up)).all()), "someone saw it turned over too early"


def test_a_barrier_that_nobody_completes_is_told_of() -> None:
    barrier = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    left = torch.full((1,), 9, dtype=torch.int32, device=DEVICE)
    await_kernel[(1,)](barrier, failed, left, 2, 5)
    assert int(failed) == 1
    assert int(left) == 0
    failed.zero_()
    await_kernel[(1,)](barrier, failed, left, -(2**31), 5)  # complete
    assert int(failed) == 0
    assert int(left) == 4
    await_kernel[(1,)](barrier, failed, left, 2, 0)  # no polls left: nothing is waited for
    assert int(failed) == 1


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = str(Path(__file__).parent / "compile_persistent.py")
    done = subprocess.run(
        [sys.executable, script, "1b", "8b", "qwen3"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


def test_nothing_spills(kernels: dict[str, dict[str, object]]) -> None:
    assert set(kernels) == {"1b", "8b", "qwen3"}
    for name, kernel in kernels.items():
        assert kernel["stack"] == kernel["local"] == 0, name
        assert kernel["shared"] <= 232_448, name  # type: ignore[operator]


def test_stores_are_published_before_a_program_announces(
    kernels: dict[str, dict[str, object]],
) -> None:
    """Triton puts no barrier of its own before a scalar atomic."""
    for name, kernel in kernels.items():
        lines = str(kernel["ptx"]).splitlines()
        releases = [
            i for i, line in enumerate(lines) if re.search(r"atom\S*\.(release|acq_rel)", line)
        ]
        assert len(releases) == 10, name  # eight barriers, attention's last arriver, sampling's
        for at in releases:
            before = lines[:at]
            barrier = max(i for i, text in enumerate(before) if "bar.sync" in text)
            stores = [i for i, text in enumerate(before) if "st.global" in text]
            assert max(stores) < barrier, name


def test_weights_are_on_their_way_before_the_barrier_is_complete(
    kernels: dict[str, dict[str, object]],
) -> None:
    """Between each product's announcement and its first poll: loads of 16 bytes, and prefetches."""
    for name, kernel in kernels.items():
        ptx, found = str(kernel["ptx"]), 0
        for part in re.split(r"atom\S*\.release", ptx)[1:]:
            between, poll, _ = part.partition("ld.global.gpu.acquire")
            if not poll:
                between, poll, _ = part.partition("ld.acquire")
            assert poll, name
            weights = re.findall(r"ld\.global\S*evict_first\S*", between)
            found += bool(weights)
            assert all(".v4.b32" in load for load in weights), name
            assert bool(weights) == ("cp.async.bulk.prefetch" in between), name
        assert found == 5, name
