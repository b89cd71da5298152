"""Decode speed and time to first token on a GPU, through the public API.

    python benchmarks/gpu_decode.py SHAPE --shared DIR [--out FILE] [--set NAME=VALUE ...]

The measurement is that of the peers' drivers in DIR/bench: a decode time is the median of three
differences between 272 and 16 tokens, over 256; a first token is the median of three prompts. SHAPE
is one of DIR/bench/shapes.py, for random weights, or a model's folder or GGUF file; what is longer
than its context is left out. `--set` changes a field of EngineConfig.
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
from agentrt.models.base import ModelSpec, read_spec
from agentrt.weights import open_checkpoint

DECODE = ((1, 1024), (8, 1024), (32, 1024), (1, 16384), (8, 16384))
PROMPTS = (2048, 16384, 32768)
MAX_CONTEXT = 40960
MOST_NEW = 272  # tokens behind a prompt


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


def step_bytes(spec: ModelSpec, batch: int, context: int) -> int:
    """Weights and KV that one decode step reads, in bytes of bf16."""
    hidden, layers, kv_width = spec.hidden_size, spec.num_layers, spec.num_kv_heads * spec.head_dim
    attention = 2 * hidden * (spec.num_heads * spec.head_dim + kv_width)
    weights = layers * (attention + 3 * hidden * spec.intermediate_size) + spec.vocab_size * hidden
    return 2 * (weights + batch * (context + 136) * 2 * layers * kv_width)


async def decode_ms(engine: Engine, rng: random.Random, batch: int, context: int) -> float:
    prompts = [tokens(rng, context) for _ in range(batch)]
    await asyncio.gather(*(engine.generate(prompt, options(4)) for prompt in prompts))
    times = []
    for num in (16, MOST_NEW) * 3:
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


async def measure(model: str, spec: ModelSpec, given: dict[str, Any]) -> dict[str, Any]:
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    config, longest = EngineConfig(**given), min(MAX_CONTEXT, spec.max_context_tokens)
    begin = time.perf_counter()
    result: dict[str, Any] = {"config": given, "bandwidth": bandwidth, "decode_ms": {}}
    rng = random.Random(0)
    async with Engine(model, config) as engine:
        await engine.generate(tokens(rng, 64), options(8))
        result["start_s"] = round(time.perf_counter() - begin, 1)
        for batch, context in DECODE:
            if context + MOST_NEW > longest:
                continue
            took = await decode_ms(engine, rng, batch, context)
            share = step_bytes(spec, batch, context) / (took / 1e3) / bandwidth
            result["decode_ms"][f"bs{batch}_ctx{context}"] = [round(took, 4), round(share, 3)]
            of = f"{share:.0%} of {bandwidth / 1e12:.2f} TB/s"
            print(f"decode {batch} x {context}: {took:.3f} ms, {of}", flush=True)
        result["ttft_ms"] = await first_tokens(engine, rng, longest)
        result["stats"] = {"kernels": engine.stats().kernels, "steps": engine.stats().steps}
    return result


async def first_tokens(engine: Engine, rng: random.Random, longest: int) -> dict[str, float]:
    found = {}
    for num in (one for one in PROMPTS if one + MOST_NEW <= longest):
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


def subject(arguments: argparse.Namespace) -> tuple[str, ModelSpec, dict[str, Any]]:
    """What is measured: a model, or a folder with the shape's config.json alone; its numbers; and
    the engine's settings. The peers' drivers are importable from now on."""
    sys.path.insert(0, str(arguments.shared / "bench"))
    import shapes

    given = {"device": "cuda", "max_context_tokens": MAX_CONTEXT}
    if arguments.shape in shapes.SHAPES:
        given["random_weights"] = True
        model = shapes.write(arguments.shape, tempfile.mkdtemp())
        values = shapes.SHAPES[arguments.shape]
    else:
        given["disk_kv_bytes"] = 0  # random prompts would leave rubbish behind
        model = arguments.shape
        with open_checkpoint(Path(model)) as checkpoint:
            values = checkpoint.config
    return model, read_spec(values), {**given, **settings(arguments.settings)}


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print what was found, and keep it where asked to."""
    result = {"shape": arguments.shape, "device": torch.cuda.get_device_name(), **result}
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    report(arguments, asyncio.run(measure(*subject(arguments))))


if __name__ == "__main__":
    main()
