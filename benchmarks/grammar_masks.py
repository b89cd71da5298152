"""What masks cost: streams held to a JSON schema, filled beside the forward or after it.

    python benchmarks/grammar_masks.py [--streams 1 4 16] [--repeats 5] [--json FILE]

Each repeat runs the three ways in turn: free (no grammar, the same number of tokens), masks filled
on the step thread when a token is sampled, and masks filled by a thread while the model computes.
The ratios are of the medians, per step, since drafts make the number of steps depend on the text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.grammar import json_schema
from agentrt.grammar_masks import Asked, Filling, MaskThread

WAYS = ("free", "after", "beside")
# No text ends within the tokens that are asked for, and none is forced for long.
TEXT = {"type": "string", "minLength": 1500, "maxLength": 2000}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["note", "order", "reply"]}, "text": TEXT},
    "required": ["kind", "text"],
    "additionalProperties": False,
}


class AfterForward(MaskThread):
    """Fills nothing: the sampler asks each grammar when it comes to its row."""

    def begin(self, asked: Sequence[Asked]) -> Filling | None:
        return None


async def run(engine: Engine, way: str, num_streams: int, num_tokens: int) -> float:
    """Milliseconds a step."""
    runner: Any = engine._open.loop.runner
    runner.masks.close()
    runner.masks = MaskThread() if way == "beside" else AfterForward()
    options = [
        GenerateOptions(
            max_tokens=num_tokens,
            temperature=0.7,
            seed=seed,
            ignore_eos=way == "free",
            grammar=None if way == "free" else json_schema(SCHEMA),
        )
        for seed in range(num_streams)
    ]
    prompts = [f"Message {seed}. Write a note as JSON.\n" for seed in range(num_streams)]
    begin, steps = time.perf_counter(), engine.stats().steps
    await asyncio.gather(*map(engine.generate, prompts, options))
    return 1000 * (time.perf_counter() - begin) / (engine.stats().steps - steps)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    config = EngineConfig(disk_kv_bytes=0, speculation=False)  # a step is a token of each stream
    async with Engine("smollm2-135m", config) as engine:
        for num_streams in arguments.streams:
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            for way in WAYS:
                await run(engine, way, num_streams, 4)
            for _ in range(arguments.repeats):
                for way in WAYS:
                    taken[way].append(await run(engine, way, num_streams, arguments.tokens))
            medians = {way: statistics.median(values) for way, values in taken.items()}
            rows.append({"streams": num_streams, **medians})
            print(
                f"{num_streams:3} streams: "
                + ", ".join(f"{way} {medians[way]:.2f} ms a step" for way in WAYS)
                + f"; after / free {medians['after'] / medians['free']:.3f}"
                + f", beside / free {medians['beside'] / medians['free']:.3f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
