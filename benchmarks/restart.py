"""The disk tier on a CPU with SmolLM2: a restart is warm, and a hit never costs more than a miss.

    python benchmarks/restart.py --shared DIR [--tokens 6000] [--repeats 3] [--json FILE]

Restart: a conversation of --tokens tokens is computed and the process ends; a new process opens the
cache folder and continues it. Both times to the first token are measured in fresh processes, so
that nothing is warm but the disk (and the system's page cache, as after any restart of a program).
Hits: in one process, prompts of several lengths are computed with the tier off, then loaded from
disk by an engine whose device pool is empty.
"""

import argparse
import asyncio
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.config import default_cache_dir
from agentrt.registry import locate

LENGTHS = (64, 256, 1024, 4096, 7680)
ONE = GenerateOptions(max_tokens=1, ignore_eos=True)
DISK_BYTES = 4 << 30


def conversation(shared: Path, num_tokens: int, index: int = 0) -> list[int]:
    """Tokens of real conversations, one after the other."""
    with gzip.open(shared / "traces" / "tau_airline_tokens.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    ids = [
        i
        for row in rows[index:] + rows[:index]
        for _, segment, _ in row["segments"]
        for i in segment
    ]
    return ids[:num_tokens]


def config(folder: Path, *, disk: bool) -> EngineConfig:
    return EngineConfig(cache_dir=folder, disk_kv_bytes=DISK_BYTES if disk else 0)


async def first_token(folder: Path, ids: list[int], *, disk: bool) -> dict[str, Any]:
    """Seconds to the first token in a new engine, after a few tokens of warm-up."""
    async with Engine(str(model()), config(folder, disk=disk)) as engine:
        await engine.generate([1, 2, 3], ONE)
        done = await engine.generate(ids, ONE)
        return {"ttft_s": done.usage.ttft_s, "cached": dict(done.usage.cached_tokens)}


def model() -> Path:
    return locate("smollm2-135m", default_cache_dir())


def in_new_process(arguments: argparse.Namespace, folder: Path, *, disk: bool) -> dict[str, Any]:
    command = [
        *(sys.executable, __file__, "--shared", arguments.shared, "--tokens", arguments.tokens),
        *("--child", folder, *(["--disk"] if disk else [])),
    ]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure_restart(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cold = [in_new_process(arguments, folder, disk=False) for _ in range(arguments.repeats)]
    written = in_new_process(arguments, folder, disk=True)
    assert written["cached"]["disk"] == 0
    warm = [in_new_process(arguments, folder, disk=True) for _ in range(arguments.repeats)]
    cold_s, warm_s = (statistics.median(r["ttft_s"] for r in results) for results in (cold, warm))
    return {
        "cold_s": cold_s,
        "warm_s": warm_s,
        "ratio": cold_s / warm_s,
        "cached": warm[-1]["cached"],
    }


async def measure_hits(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = conversation(arguments.shared, length, 10 * index + 1)
        cold, warm = [], []
        await first_token(folder, ids, disk=True)
        for _ in range(arguments.repeats):
            cold.append(await first_token(folder, ids, disk=False))
            warm.append(await first_token(folder, ids, disk=True))
        cold_s, warm_s = (
            statistics.median(r["ttft_s"] for r in results) for results in (cold, warm)
        )
        rows.append(
            {
                "tokens": length,
                "cold_s": cold_s,
                "warm_s": warm_s,
                "disk": warm[-1]["cached"]["disk"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--disk", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        ids = conversation(arguments.shared, arguments.tokens)
        print(json.dumps(asyncio.run(first_token(arguments.child, ids, disk=arguments.disk))))
        return
    with tempfile.TemporaryDirectory() as name:
        restart = measure_restart(arguments, Path(name) / "restart")
        hits = asyncio.run(measure_hits(arguments, Path(name) / "hits"))
    print(
        f"restart, {arguments.tokens} tokens: first token {restart['cold_s']:.3f} s computed, "
        f"{restart['warm_s']:.3f} s from disk: {restart['ratio']:.1f}x sooner"
    )
    print(f"{'tokens':>8}{'computed, s':>14}{'from disk, s':>14}{'ratio':>8}{'loaded':>8}")
    for row in hits:
        print(
            f"{row['tokens']:8}{row['cold_s']:14.3f}{row['warm_s']:14.3f}"
            f"{row['warm_s'] / row['cold_s']:8.2f}{row['disk']:8}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"restart": restart, "hits": hits}, indent=1))


if __name__ == "__main__":
    main()
