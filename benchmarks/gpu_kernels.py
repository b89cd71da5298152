r"""Every kernel of a step on its own: bytes, time, and the fraction of the measured bandwidth.

    python benchmarks/gpu_kernels.py SHAPE... --shared DIR [--out FILE] [--batches 1 8 32] \
        [--deterministic]
    python benchmarks/gpu_kernels.py SHAPE... --shared DIR --only attention \
        --stages 1 2 3 4 --warps 4 8

A kernel's time is that of a chain of its launches in one CUDA graph, dependent launch included,
over as many different weights (or layers of KV) as it takes to leave nothing in the L2 cache.
Chunks of prefill are products by cuBLAS and attention; their share is of the tensor cores' 790
TFLOP/s.

The second form times decode attention with other pipelines, on its own and behind the product that
it follows in a step: a kernel in much shared memory starts late there, which no chain of its own
kind shows. `after qkv` is what a pair takes more than the product alone.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_decode import read_bandwidth

from agentrt.kernels import Geometry
from agentrt.kernels.attention_decode import DecodeRows, decode_attention, num_tiles
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.cuda_attention import Attention
from agentrt.kernels.cuda_products import CudaLinear, Rows

BLOCK_TOKENS = 64
CHAIN_BYTES = 4e8
TENSOR_FLOPS = 7.9e14
CHUNKS = ((2048, 0), (2048, 14336), (200, 16384), (200, 32768))
Times = dict[str, dict[str, float]]


def chain_ms(launch: Callable[[int], object], number: int) -> float:
    """One of `number` launches in a row, as a graph: the median of nine replays."""
    for index in range(number):
        launch(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(number):
            launch(index)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / number


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


class Kernels:
    """The kernels of one model shape."""

    def __init__(self, shape: dict[str, Any], bandwidth: float, *, deterministic: bool) -> None:
        self.shape, self.bandwidth = shape, bandwidth
        self.hidden, self.width = shape["hidden_size"], shape["intermediate_size"]
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.dim, self.vocab = shape["head_dim"], shape["vocab_size"]
        angles = torch.rand(40960, self.dim // 2, device="cuda")
        self.geometry = Geometry(
            self.heads, self.kv_heads, self.dim, 1e-5, angles.cos(), angles.sin(), self.hidden
        )
        self.ops = CudaOps(torch.device("cuda"), deterministic=deterministic)
        self.scratch = Scratch.allocate(
            self.geometry,
            vocab_size=self.vocab,
            max_batch=64,
            device=self.ops.device,
            deterministic=deterministic,
        )

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows and columns of each."""
        yield "qkv", (self.heads + 2 * self.kv_heads) * self.dim, self.hidden
        yield "output", self.hidden, self.heads * self.dim
        yield "gate_up", 2 * self.width, self.hidden
        yield "down", self.hidden, self.width
        yield "head", self.vocab, self.hidden

    def products(self, num_rows: int) -> Times:
        """Each matrix times `num_rows` rows."""
        found: Times = {}
        table, norm = normal(512, self.hidden), torch.ones_like(normal(self.hidden))
        ids = torch.arange(num_rows, dtype=torch.int32, device="cuda") % 512
        rows = Rows(token_ids=ids, slots=ids, positions=ids, tables=ids[None], last_tokens=ids)
        products: Any = self.ops.products(num_rows, 1e-5, self.scratch)
        for name, outputs, inputs in self.matrices():
            if name == "head" and num_rows > 64:
                continue
            number = max(2, int(CHAIN_BYTES / (2 * outputs * inputs)))
            weights = [CudaLinear(normal(outputs, inputs) * 0.02, None) for _ in range(number)]
            hidden, x = products.embed(rows, table, norm)
            given = normal(num_rows, inputs)

            def launch(
                index: int,
                name: str = name,
                weights: list[CudaLinear] = weights,
                x: Any = x,
                hidden: torch.Tensor = hidden,
                given: torch.Tensor = given,
            ) -> object:
                weight = weights[index]
                if name in ("output", "down"):
                    return products.add_norm(hidden, given, weight, norm)
                if name == "gate_up":
                    return products.gate_up(x, weight)
                if name == "head":
                    return products.logits(x, weight)
                return products.linear(x, weight)

            ms = chain_ms(launch, number)
            found[name] = self._share(ms, 2 * outputs * inputs, 2 * outputs * inputs * num_rows)
        return found

    def decode_attention(self, batch: int, context: int) -> dict[str, float]:
        blocks = context // BLOCK_TOKENS + 1
        layers = max(2, int(CHAIN_BYTES / (batch * context * self.kv_heads * self.dim * 4)))
        layers = min(layers, 16)
        kv = normal(layers, 2, batch * blocks, self.kv_heads, BLOCK_TOKENS, self.dim)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        tables = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
        slots = torch.arange(batch, **ints)
        positions = torch.full((batch,), context, **ints)
        starts = torch.arange(batch + 1, **ints) * num_tiles(context, self.dim)
        rows = Rows(
            token_ids=slots, slots=slots, positions=positions, tables=tables, last_tokens=slots
        )
        step = self.ops.plan_decode(rows, starts, kv, self.geometry, self.scratch)
        qkv = normal(batch, (self.heads + 2 * self.kv_heads) * self.dim)
        ms = chain_ms(lambda layer: step.attend(layer, qkv, None), layers)
        tokens = batch * context
        return self._share(
            ms, 4 * tokens * self.kv_heads * self.dim, 4 * tokens * self.heads * self.dim
        )

    def decode_pipeline(
        self, batch: int, context: int, stages: int, warps: int
    ) -> dict[str, float]:
        """Decode attention so compiled: of a chain of it alone, and behind its product."""
        layer_bytes = 4 * batch * context * self.kv_heads * self.dim
        layers = max(2, int(CHAIN_BYTES / layer_bytes))
        blocks = context // BLOCK_TOKENS + 1
        kv = normal(layers, 2, batch * blocks, self.kv_heads, BLOCK_TOKENS, self.dim)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        rows = DecodeRows(
            torch.arange(batch, **ints),
            torch.full((batch,), context, **ints),
            torch.arange(batch + 1, **ints) * num_tiles(context, self.dim),
            torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks),
        )
        width = (self.heads + 2 * self.kv_heads) * self.dim
        out = normal(batch, self.heads * self.dim)
        weight = CudaLinear(normal(width, self.hidden) * 0.02, None)
        products: Any = self.ops.products(batch, 1e-5, self.scratch)
        table, norm, ids = normal(512, self.hidden), normal(self.hidden), rows.slots
        _, x = products.embed(
            Rows(token_ids=ids, slots=ids, positions=ids, tables=ids[None], last_tokens=ids),
            table,
            norm,
        )

        def attend(layer: int, qkv: torch.Tensor) -> object:
            geometry = self.geometry
            return decode_attention(
                qkv,
                kv[layer],
                out,
                rows,
                self.scratch.decode,
                geometry.cos,
                geometry.sin,
                norms=None,
                eps=1e-5,
                num_stages=stages,
                num_warps=warps,
                pdl=True,
            )

        qkv = normal(batch, width)
        alone = chain_ms(lambda layer: attend(layer, qkv), layers)
        product = chain_ms(lambda _: products.linear(x, weight), layers)
        pair = chain_ms(lambda layer: attend(layer, products.linear(x, weight)), layers)
        return {
            "us": round(1e3 * alone, 2),
            "TB/s": round(layer_bytes / alone / 1e9, 3),
            "us after qkv": round(1e3 * (pair - product), 2),
        }

    def prefill_attention(self, new: int, before: int) -> dict[str, float]:
        blocks = (before + new) // BLOCK_TOKENS + 1
        kv = normal(2, 2, blocks, self.kv_heads, BLOCK_TOKENS, self.dim)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        tables = torch.randperm(blocks, device="cuda").int()[None]
        slots = torch.zeros(new, **ints)
        positions = torch.arange(before, before + new, **ints)
        rows = Rows(
            token_ids=slots, slots=slots, positions=positions, tables=tables, last_tokens=slots
        )
        shape, tiles = self.ops.plan_chunks([(0, before, new, 0)], self.geometry)
        attention = Attention(
            rows=rows,
            num_decode=0,
            starts=None,
            tiles=torch.tensor(tiles, **ints),
            tile_shape=shape,
            work=self.scratch.decode,
            pdl=False,
            ordered=None if self.scratch.ordered is None else self.scratch.ordered.decode,
        )
        qkv = normal(new, (self.heads + 2 * self.kv_heads) * self.dim)
        ms = chain_ms(lambda layer: attention.attend(qkv, kv[layer], self.geometry, None), 2)
        pairs = new * before + new * (new + 1) // 2
        return self._share(
            ms, 4 * (before + new) * self.kv_heads * self.dim, 4 * pairs * self.heads * self.dim
        )

    def _share(self, ms: float, num_bytes: int, flops: int) -> dict[str, float]:
        return {
            "us": round(1e3 * ms, 2),
            "MB": round(num_bytes / 1e6, 2),
            "TB/s": round(num_bytes / ms / 1e9, 3),
            "of bandwidth": round(num_bytes / ms * 1e3 / self.bandwidth, 3),
            "of tensor cores": round(flops / ms * 1e3 / TENSOR_FLOPS, 3),
        }


def show(title: str, times: Times) -> None:
    print(title)
    for name, row in times.items():
        print(f"  {name:24}" + "  ".join(f"{value:>9} {unit}" for unit, value in row.items()))
    sys.stdout.flush()


def all_kernels(kernels: Kernels, batches: list[int]) -> dict[str, Times]:
    result = {}
    for batch in batches:
        times = kernels.products(batch)
        for context in (1024, 16384) if batch <= 8 else (1024,):
            times[f"attention {context}"] = kernels.decode_attention(batch, context)
        result[f"batch {batch}"] = times
        show(f"decode, batch {batch}", times)
    for new in sorted({new for new, _ in CHUNKS}):
        times = kernels.products(new)
        for rows, before in CHUNKS:
            if rows == new:
                times[f"attention {before}+{new}"] = kernels.prefill_attention(new, before)
        result[f"chunk {new}"] = times
        show(f"prefill, chunk of {new}", times)
    return result


def pipelines(
    kernels: Kernels, batches: list[int], stages: list[int], warps: list[int]
) -> dict[str, Times]:
    result = {}
    for batch, context in itertools.product(batches, (1024, 16384)):
        times = {
            f"{num_stages} stages, {num_warps} warps": kernels.decode_pipeline(
                batch, context, num_stages, num_warps
            )
            for num_stages, num_warps in itertools.product(stages, warps)
        }
        torch.cuda.empty_cache()
        result[f"batch {batch}, context {context}"] = times
        show(f"decode attention, batch {batch}, context {context}", times)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--only", choices=["attention"])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--warps", type=int, nargs="+", default=[4])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.shared / "bench"))
    import shapes

    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    result = {}
    with torch.inference_mode():
        for shape in arguments.shapes:
            kernels = Kernels(
                shapes.SHAPES[shape], bandwidth, deterministic=arguments.deterministic
            )
            print(shape)
            if arguments.only:
                given = arguments.batches, arguments.stages, arguments.warps
                result[shape] = pipelines(kernels, *given)
            else:
                result[shape] = all_kernels(kernels, arguments.batches)
    if arguments.out:
        measured = {"bandwidth_TB": bandwidth / 1e12, "shapes": result}
        arguments.out.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
