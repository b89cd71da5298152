"""What drafts cost on a GPU, and what they save where text repeats itself.

    python benchmarks/gpu_speculation.py SHAPE --shared DIR [--model PATH] [--out FILE]
        [--set NAME=VALUE ...]

First random weights of SHAPE, with drafts that are always wrong: what a decode step takes with so
many, against one without that the next runs ahead of; the difference is how many tokens of a
draft must be right for it to pay. Then, with `--model` (a folder or a GGUF file, SmolLM2 for
instance), two engines side by side, with speculation off and on: prompts that have recorded tool
results of DIR repeated, and what drafts cost where nothing repeats (noise, ROUNDS times in turn).
"""

import argparse
import asyncio
import gzip
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define
from gpu_decode import decode_ms, options, parser_of, report, subject, tokens

from agentrt import Completion, Engine, EngineConfig, GenerateOptions
from agentrt.mixed_graph import MOST_CHECKED_ROWS
from agentrt.speculate import Drafter, DraftLimits

CONTEXT = 1024
CELLS = {1: (3, 7, 15), 4: (3, 7, 15), 16: (1, 3)}  # by batch: tokens of a draft
WARM_UP = 2  # prompts before those that count
ROUNDS = 9
KV_BYTES = 2 << 30  # of each of two engines
BATCHES = (1, 2, 4)  # prompts at once
SHORTEST, LONGEST = 200, 900  # characters of a tool result


@define
class Wrong(Drafter):
    """Guesses `num_guessed` tokens of which none is right, in every step."""

    num_guessed: int = 0

    def _guess(self, request: Any, words: Any, num_tokens: int) -> Any:
        return np.full(min(num_tokens, self.num_guessed), 1, dtype=np.int32)

    def checked(self, request: Any, num_draft: int, num_right: int) -> None:
        """Learn nothing: it goes on."""
        self.num_drafted, self.num_right = self.num_drafted + num_draft, self.num_right + num_right


def wrong(num_guessed: int) -> Wrong:
    rows = MOST_CHECKED_ROWS
    limits = DraftLimits(guess_rows=rows, most_rows=rows, least_tokens=num_guessed)
    return Wrong(limits, num_guessed=num_guessed)


async def costs(folder: str, config: EngineConfig) -> dict[str, Any]:
    """Milliseconds of a step, by batch and tokens of a draft."""
    found: dict[str, Any] = {}
    rng = random.Random(0)
    async with Engine(folder, config) as engine:
        await engine.generate(tokens(rng, 64), options(8))
        scheduler = engine._open.loop.scheduler
        for batch, drafts in CELLS.items():
            plain = None
            for num in (0, *drafts):
                scheduler.drafter = drafter = wrong(num) if num else None
                took = await decode_ms(engine, rng, batch, CONTEXT)
                plain = plain or took
                cell = {"ms": round(took, 4), "pays_from": round(took / plain - 1, 3)}
                if drafter is not None:
                    cell["right"] = drafter.num_right / max(drafter.num_drafted, 1)
                found[f"bs{batch}_draft{num}"] = cell
                print(f"{batch} rows, drafts of {num}:", json.dumps(cell), flush=True)
    return found


def results(shared: Path) -> list[str]:
    """Recorded tool results in JSON that are neither short nor long."""
    with gzip.open(shared / "traces" / "tau_airline.jsonl.gz") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    texts = (m["content"] for messages in conversations for m in messages if m["role"] == "tool")
    fit = (text for text in texts if SHORTEST <= len(text) <= LONGEST and text[0] in "{[")
    return list(dict.fromkeys(fit))


def to_repeat(texts: list[str]) -> list[str]:
    """Prompts that show how one text is copied, and then give the next."""
    return [
        f"Original:\n{one}\n\nCopy:\n{one}\n\nOriginal:\n{other}\n\nCopy:\n"
        for one, other in zip(texts[::2], texts[1::2], strict=False)
    ]


async def said(
    engine: Engine, prompts: list[str], asked: list[GenerateOptions]
) -> tuple[list[Completion], dict[str, float]]:
    """All prompts at once, and the decode steps and milliseconds that a token took, without those
    of the prompts."""
    short = GenerateOptions(max_tokens=1, ignore_eos=True)
    await asyncio.gather(*(engine.generate(prompt, short) for prompt in prompts))  # now cached
    before, begin = engine.stats(), time.perf_counter()
    done = await asyncio.gather(*map(engine.generate, prompts, asked))
    wall_s, after = time.perf_counter() - begin, engine.stats()
    longest = max(len(one.token_ids) for one in done)
    drafted = after.drafted_tokens - before.drafted_tokens
    return done, {
        "steps_per_token": round((after.steps - before.steps) / longest, 3),
        "ms_per_token": round(1e3 * wall_s / longest, 4),
        "drafted": drafted,
        "right": round((after.accepted_tokens - before.accepted_tokens) / max(drafted, 1), 3),
    }


def asked(batch: int, temperature: float, seeds: Iterator[int]) -> list[GenerateOptions]:
    return [
        GenerateOptions(max_tokens=256, ignore_eos=True, temperature=temperature, seed=next(seeds))
        for _ in range(batch)
    ]


async def savings(model: str, shared: Path, given: dict[str, Any]) -> dict[str, Any]:
    """With speculation off and on, in turn. No prompt of copies comes twice: what one request wrote
    is where the next one's drafts come from, and none may find its own output there.
    """
    own = {"disk_kv_bytes": 0, "host_kv_bytes": 0, "device_kv_bytes": KV_BYTES}
    texts, seeds = to_repeat(results(shared)), itertools.count()
    async with AsyncExitStack() as stack:
        engines = {}
        for name, speculation in (("off", False), ("on", True)):
            config = EngineConfig(**{**given, **own, "speculation": speculation})
            engines[name] = await stack.enter_async_context(Engine(model, config))
        found, left = {}, iter(texts)
        for batch in (WARM_UP, *BATCHES):
            prompts = [next(left) for _ in range(batch)]
            found[f"copy, {batch}"] = await copy_cell(engines, prompts, asked(batch, 0.0, seeds))
        for batch in BATCHES:
            found[f"noise, {batch}"] = await noise_cell(engines, texts[:batch], seeds)
        for name, cell in found.items():
            print(name, json.dumps(cell), flush=True)
    return found


async def copy_cell(
    engines: dict[str, Engine], prompts: list[str], options: list[GenerateOptions]
) -> dict[str, Any]:
    outputs, cell = {}, {}
    for name, engine in engines.items():
        outputs[name], cell[name] = await said(engine, prompts, options)
    ratio = cell["on"]["ms_per_token"] / cell["off"]["ms_per_token"]
    return {**cell, "ratio": round(ratio, 3), "same": same(outputs["off"], outputs["on"])}


async def noise_cell(
    engines: dict[str, Engine], prompts: list[str], seeds: Iterator[int]
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(ROUNDS):
        options = asked(len(prompts), 3.0, seeds)
        for name in list(engines)[:: 1 if index % 2 else -1]:
            _, cell = await said(engines[name], prompts, options)
            times[name].append(cell["ms_per_token"])
    median = {name: statistics.median(each) for name, each in times.items()}
    return {**median, "ratio": round(median["on"] / median["off"], 3)}


def same(plain: list[Completion], drafted: list[Completion]) -> float:
    """How much of the outputs stands before the first token that differs: near ties may, as draft
    rows go through other kernels than rows alone."""
    equal = total = 0
    for one, other in zip(plain, drafted, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
        equal += next((i for i, (a, b) in pairs if a != b), len(one.token_ids))
        total += len(one.token_ids)
    return round(equal / total, 3)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, _, given = subject(arguments)
    config = EngineConfig(**{**given, "max_context_tokens": 4096, "host_kv_bytes": 0})
    result: dict[str, Any] = {"costs": await costs(model, config)}
    if arguments.model:
        real = {**given, "random_weights": False}
        result["savings"] = await savings(arguments.model, arguments.shared, real)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    report(arguments, asyncio.run(measure(arguments)))


if __name__ == "__main__":
    main()
