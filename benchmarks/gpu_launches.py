"""One decode step, launched in four ways: milliseconds, and the share of the memory's bandwidth.

    python benchmarks/gpu_launches.py SHAPE --shared DIR [--batches 1 2 4 8] [--context 1024] \
        [--sweep] [--out FILE]

The ways: kernel by kernel without a graph; a graph of plain launches; a graph of dependent launches
(the default); all layers in one cooperative launch (`decode_launch="persistent"`, at most 8 rows),
captured and as it is. They compute the same steps first: a way whose greedy token is neither
the default's nor as good as that in the default's own logits ends the run. Then each does TURN
steps in a row, ROUNDS times, and the median round counts. `--sweep` also times other shapes of the
one launch: for one row, numbers of a tile in a thread, and tiles on their way into the L2 cache at
a barrier; for several, tiles on their way at once, and columns that are asked for in that cache.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import torch
from gpu_decode import read_bandwidth, step_bytes

from agentrt import EngineConfig
from agentrt.decode_graph import DecodeGraphs, DecodeInputs, parts
from agentrt.decode_persistent import OneLaunch, batch_step, persistent_step
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.persistent_batch_step import MOST_ROWS, BatchGrid
from agentrt.kernels.persistent_step import PersistentGrid
from agentrt.models.llama import LlamaModel
from agentrt.models.load import load_model
from agentrt.step_device import CudaDevice

BLOCK_TOKENS = 64
CHECKED_STEPS = 12
NEAR = 0.1  # of the logits' deviation: some times bf16's own error; a wrong token is 4 away
TURN, ROUNDS = 20, 9
ROW_SHAPES = [(numbers, ahead) for numbers in (64, 32) for ahead in (0, 1, 2, 4)]
BATCH_SHAPES = [(4, 3, 0), (4, 3, 128), (4, 3, 512), (3, 3, 256), (5, 3, 256), (4, 2, 256)]
Way = tuple[Callable[[], object], torch.Tensor]  # how to run a step, and its logits


class Steps:
    """A model with random weights, and rows that have `context` random keys and values each."""

    def __init__(self, batch: int, context: int, model: LlamaModel, ops: CudaOps) -> None:
        self.batch, self.context, self.model, self.ops = batch, context, model, ops
        self.kept: list[object] = []
        spec, device = model.spec, ops.device
        blocks = (context + CHECKED_STEPS) // BLOCK_TOKENS + 1
        size = (spec.num_layers, 2, batch * blocks, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
        self.kv = torch.randn(size, dtype=torch.bfloat16, device=device)
        order = torch.randperm(batch * blocks, device=device).int()
        self.tables = order.view(batch, blocks)
        self.last_tokens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.scratch = Scratch.allocate(
            model.geometry, vocab_size=spec.vocab_size, max_batch=64, device=device
        )
        self.inputs = DecodeInputs.allocate(batch, device, batch)

    def graphs(self, *, pdl: bool) -> DecodeGraphs:
        ops = attrs.evolve(self.ops, pdl=pdl)
        return DecodeGraphs(
            self.model,
            ops,
            self.kv,
            self.scratch,
            self.inputs,
            self.tables,
            self.last_tokens,
            CudaDevice(),
        )

    def prepare(self, tokens: list[int], position: int) -> None:
        """Every step from now on has these tokens at this position."""
        width = self.batch
        flat = np.zeros(len(self.inputs.flat), dtype=np.int32)
        fields, starts, _, _ = parts(flat, width)
        fields[0], fields[1], fields[2] = tokens, range(width), position
        tiles = num_tiles(position, self.model.geometry.head_dim)
        starts[:] = tiles * np.arange(width + 1)
        torch.cuda.synchronize()
        self.inputs.ring[:] = torch.from_numpy(flat)

    def ways(self, *, sweep: bool) -> dict[str, Way]:
        """Compiled and captured; the default comes first."""
        device, found = CudaDevice(), {}
        self.prepare([1] * self.batch, self.context)
        plain, dependent = self.graphs(pdl=False), self.graphs(pdl=True)
        for name, graphs in (("graph, dependent launches", dependent), ("graph", plain)):
            made = device.capture(partial(graphs.compute, self.batch))
            found[name] = (made.replay, made.logits)
        logits = torch.empty_like(found["graph"][1])
        found["no graph"] = (lambda: logits.copy_(plain.compute(self.batch)), logits)
        if self.batch <= MOST_ROWS:
            found |= self._persistent(plain, sweep=sweep)
        return found

    def _persistent(self, graphs: DecodeGraphs, *, sweep: bool) -> dict[str, Way]:
        device, found = CudaDevice(), {}
        steps = self._steps(graphs, sweep=sweep)
        for name, step in steps.items():
            self.kept.append(step)  # the graph holds its addresses alone
            made = device.capture(step.launch)
            found[name] = (made.replay, made.logits)
        step = next(iter(steps.values()))
        found["one launch"] = (step.launch, step.logits)
        return found

    def _steps(self, graphs: DecodeGraphs, *, sweep: bool) -> dict[str, OneLaunch]:
        """The chosen one comes first."""
        make: Callable[..., OneLaunch]
        if self.batch == 1:
            make = partial(persistent_step, graphs)
            chosen = PersistentGrid.choose(self.ops.device, self.model.geometry.head_dim)
            names, shapes = ("numbers_per_thread", "prefetch_tiles"), ROW_SHAPES
        else:
            make = partial(batch_step, graphs, self.batch)
            chosen = BatchGrid.choose(self.ops.device)
            names, shapes = ("num_stages", "attention_stages", "prefetch_columns"), BATCH_SHAPES
        found = {"one launch, captured": make(chosen)}
        for shape in shapes if sweep else ():
            given = dict(zip(names, shape, strict=True))
            found[f"one launch, {given}"] = make(attrs.evolve(chosen, **given))
        return found

    def check(self, ways: dict[str, Way]) -> dict[str, int]:
        """How many tokens of each way were not the default's, though as good. SystemExit for one
        that is worse."""
        default, tokens = next(iter(ways)), [1] * self.batch
        others = dict.fromkeys(ways, 0)
        for position in range(self.context, self.context + CHECKED_STEPS):
            self.prepare(tokens, position)
            found, expected = {}, None
            for name, (run, logits) in ways.items():
                self.inputs.outbox.fill_(-1)
                run()
                torch.cuda.synchronize()
                found[name] = self.inputs.outbox[0].tolist()
                expected = logits.clone() if expected is None else expected
                for row, token in enumerate(found[name]):
                    lost = float(expected[row].max() - expected[row, token]) if token >= 0 else 9e9
                    others[name] += token != found[default][row]
                    if not lost <= NEAR * float(expected[row].std()):
                        sys.exit(
                            f"{name}: token {token} for {found[default][row]}, {lost:.3f} less"
                        )
            tokens = found[default]
        return others

    def milliseconds(self, ways: dict[str, Way]) -> dict[str, float]:
        """Of a step. The ways take turns, so that all see the same clocks."""
        self.prepare([1] * self.batch, self.context)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (run, _) in ways.items():
                run()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(TURN):
                    run()
                end.record()
                torch.cuda.synchronize()
                times[name].append(begin.elapsed_time(end) / TURN)
        return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.shared / "bench"))
    import shapes

    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    folder = shapes.write(arguments.shape, tempfile.mkdtemp())
    config = EngineConfig(
        device="cuda", random_weights=True, max_context_tokens=arguments.context + 1024
    )
    loaded, result = load_model(Path(folder), config), {}
    ops = loaded.compute.ops
    assert isinstance(ops, CudaOps)
    print(f"{arguments.shape}, {torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for batch in arguments.batches:
            steps = Steps(batch, arguments.context, loaded.model, ops)
            ways = steps.ways(sweep=arguments.sweep)
            others, times = steps.check(ways), {}
            times = steps.milliseconds(ways)
            result[f"bs{batch}"] = {"ms": times, "other tokens": others}
            num_bytes = step_bytes(loaded.model.spec, batch, arguments.context)
            default = next(iter(ways))
            print(f"batch {batch}, context {arguments.context}, {num_bytes / 1e9:.2f} GB a step")
            for name, ms in sorted(times.items(), key=lambda item: item[1]):
                share = num_bytes / (ms / 1e3) / bandwidth
                print(
                    f"  {name:44} {ms:7.3f} ms  {share:5.1%} of the copy  "
                    f"{ms / times[default]:6.3f} of the default, {others[name]} other tokens",
                    flush=True,
                )
    if arguments.out:
        given = {"shape": arguments.shape, "bandwidth": bandwidth, "context": arguments.context}
        arguments.out.write_text(json.dumps(given | result, indent=1))


if __name__ == "__main__":
    main()
