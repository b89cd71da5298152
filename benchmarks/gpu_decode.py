"""Decode speed and time to first token on a GPU, through the public API, with random weights.

    python benchmarks/gpu_decode.py SHAPE --shared DIR [--out FILE] [--set NAME=VALUE ...]

The measurement is that of the peers' drivers in DIR/bench: a decode time is the median of three
differences between 272 and 16 tokens, over 256; a first token is the median of three prompts. SHAPE
is one of DIR/bench/shapes.py. `--set` changes a field of EngineConfig.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from agentrt import Engine, EngineConfig, GenerateOptions

DECODE = ((1, 1024), (8, 1024), (32, 1024), (1, 16384), (8, 16384))
PROMPTS = (2048, 16384, 32768)


def options(num_tokens: int) -> GenerateOptions:
    return GenerateOptions(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def read_bandwidth() -> float:
    """What a large copy moves, in bytes a second, read and written."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.numel() / (sorted(times)[2] / 1e3)


def step_bytes(shape: dict[str, Any], batch: int, context: int) -> int:
    """Weights and KV that one decode step reads, in bytes of bf16."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, kv_heads, dim = (
        shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * shape["intermediate_size"])
    weights += shape["vocab_size"] * hidden
    return 2 * (weights + batch * (context + 136) * 2 * layers * kv_heads * dim)


async def decode_ms(engine: Engine, rng: random.Random, batch: int, context: int) -> float:
    prompts = [tokens(rng, context) for _ in range(batch)]
    await asyncio.gather(*(engine.generate(prompt, options(4)) for prompt in prompts))
    times = []
    for num in (16, 272, 16, 272, 16, 272):
        begin = time.perf_counter()
        await asyncio.gather(*(engine.generate(prompt, options(num)) for prompt in prompts))
        times.append(time.perf_counter() - begin)
    differences = sorted(b - a for a, b in zip(times[::2], times[1::2], strict=True))
    return 1e3 * differences[1] / 256


def tokens(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(num)]


async def first_token_ms(engine: Engine, prompt: list[int]) -> float:
    begin = time.perf_counter()
    async for _ in engine.stream(prompt, options(1)):
        break
    return 1e3 * (time.perf_counter() - begin)


def settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that is JSON is read as that."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


async def measure(folder: str, shape: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    config = EngineConfig(
        **{"device": "cuda", "random_weights": True, "max_context_tokens": 40960, **given}
    )
    begin = time.perf_counter()
    result: dict[str, Any] = {"config": given, "bandwidth": bandwidth, "decode_ms": {}}
    rng = random.Random(0)
    async with Engine(folder, config) as engine:
        await engine.generate(tokens(rng, 64), options(8))
        result["start_s"] = round(time.perf_counter() - begin, 1)
        for batch, context in DECODE:
            took = await decode_ms(engine, rng, batch, context)
            share = step_bytes(shape, batch, context) / (took / 1e3) / bandwidth
            result["decode_ms"][f"bs{batch}_ctx{context}"] = [round(took, 4), round(share, 3)]
            of = f"{share:.0%} of {bandwidth / 1e12:.2f} TB/s"
            print(f"decode {batch} x {context}: {took:.3f} ms, {of}", flush=True)
        result["ttft_ms"] = await first_tokens(engine, rng)
        result["stats"] = {"kernels": engine.stats().kernels, "steps": engine.stats().steps}
    return result


async def first_tokens(engine: Engine, rng: random.Random) -> dict[str, float]:
    found = {}
    for num in PROMPTS:
        cold, warm = [], []
        for _ in range(3):
            prompt = tokens(rng, num)
            cold.append(await first_token_ms(engine, prompt))
            warm.append(await first_token_ms(engine, prompt + tokens(rng, 200)))
        found[f"cold_{num}"] = round(sorted(cold)[1], 2)
        found[f"cached_{num}+200"] = round(sorted(warm)[1], 2)
        print(
            f"first token {num}: cold {sorted(cold)[1]:.1f} ms, +200 {sorted(warm)[1]:.1f} ms",
            flush=True,
        )
    return found


def parser_of(doc: str) -> argparse.ArgumentParser:
    """What every benchmark of an engine on a GPU is told."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    return parser


def shape_of(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A folder with the shape's config.json, and what it says. The peers' drivers are importable
    from now on."""
    sys.path.insert(0, str(arguments.shared / "bench"))
    import shapes

    return shapes.write(arguments.shape, tempfile.mkdtemp()), shapes.SHAPES[arguments.shape]


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print what was found, and keep it where asked to."""
    result = {"shape": arguments.shape, "device": torch.cuda.get_device_name(), **result}
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    folder, shape = shape_of(arguments)
    report(arguments, asyncio.run(measure(folder, shape, settings(arguments.settings))))


if __name__ == "__main__":
    main()
