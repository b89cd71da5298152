"""Every kernel of a step on its own: bytes, time, and the fraction of the measured bandwidth.

    python benchmarks/gpu_kernels.py SHAPE --shared DIR [--out FILE] [--batches 1 8 32]

A kernel's time is that of a chain of its launches in one CUDA graph, dependent launch included,
over as many different weights (or layers of KV) as it takes to leave nothing in the L2 cache.
Chunks of prefill are products by cuBLAS and attention; their share is of the tensor cores' 790
TFLOP/s.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_decode import read_bandwidth

from agentrt.kernels import Geometry
from agentrt.kernels.attention_decode import num_tiles
from agentrt.kernels.cuda import Attention, CudaOps, Scratch
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

    def __init__(self, shape: dict[str, Any], bandwidth: float) -> None:
        self.shape, self.bandwidth = shape, bandwidth
        self.hidden, self.width = shape["hidden_size"], shape["intermediate_size"]
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.dim, self.vocab = shape["head_dim"], shape["vocab_size"]
        angles = torch.rand(40960, self.dim // 2, device="cuda")
        self.geometry = Geometry(
            self.heads, self.kv_heads, self.dim, 1e-5, angles.cos(), angles.sin(), self.hidden
        )
        self.ops = CudaOps(torch.device("cuda"))
        self.scratch = Scratch.allocate(
            self.geometry, vocab_size=self.vocab, max_batch=64, device=self.ops.device
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
                    return products.add_norm(hidden, given, weight, norm, None)
                if name == "gate_up":
                    return products.gate_up(x, weight)
                if name == "head":
                    return products.logits(x, weight, None)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.shared / "bench"))
    import shapes

    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    kernels, result = Kernels(shapes.SHAPES[arguments.shape], bandwidth), {}
    with torch.inference_mode():
        for batch in arguments.batches:
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
    if arguments.out:
        bandwidth_tb = bandwidth / 1e12
        given = {"shape": arguments.shape, "bandwidth_TB": bandwidth_tb, "kernels": result}
        arguments.out.write_text(json.dumps(given, indent=1))


if __name__ == "__main__":
    main()
