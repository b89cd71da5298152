"""Agents in a device pool that holds a third of what they work on, on a CPU with SmolLM2.

    python benchmarks/pressure.py --shared DIR [--agents 24] [--turns 6] [--json FILE]

The first turns of the airline workload's agents, all at once. Waits are scaled, and a tenth of them
take 20 times the median. Three engines in one run, in turn: `recompute` has no tier below the
device; `lru` offloads to a host tier and evicts by age alone; `worth` is the default policy, told
when tools run. The device pool is a third of the agents' working set, and so is the host tier.
Then the price of the tiers for a workload that never hits: distinct prompts, tiers on and off.
"""

import argparse
import asyncio
import gzip
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from replay_all import num_shared_tokens

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.config import default_cache_dir
from agentrt.registry import locate

MEDIAN_WAIT_S = 0.5
SLOW_SHARE, SLOW_FACTOR = 0.1, 20
Rows = list[list[tuple[list[int], int, float]]]  # agent -> turn -> (new ids, output tokens, wait)


def workload(shared: Path, num_agents: int, num_turns: int, wait_scale: float) -> Rows:
    """What each agent reads, how much it writes, and how long its tool takes, turn by turn."""
    with gzip.open(shared / "traces" / "tau_airline_tokens.jsonl.gz") as file:
        rows = [json.loads(line) for line in file][:num_agents]
    rng, agents = random.Random(1), []
    for row in rows:
        turns: list[tuple[list[int], int, float]] = []
        new: list[int] = []
        for kind, ids, wait_s in row["segments"]:
            if kind == "in":
                new = new + ids
                continue
            slow = rng.random() < SLOW_SHARE
            wait = (SLOW_FACTOR * MEDIAN_WAIT_S if slow else wait_s) * wait_scale
            turns.append((new, len(ids), wait))
            new = []
        agents.append(turns[:num_turns])
    return agents


def working_set_tokens(agents: Rows) -> int:
    """Tokens of all logs, what they begin with in common counted once."""
    logs = [[token for new, _, _ in turns for token in new] for turns in agents]
    num_output = sum(output for turns in agents for _, output, _ in turns)
    return sum(map(len, logs)) - num_shared_tokens(logs) + num_output


async def run(agents: Rows, config: EngineConfig) -> dict[str, Any]:
    async with Engine(str(locate("smollm2-135m", default_cache_dir())), config) as engine:
        await engine.generate([1, 2, 3], GenerateOptions(max_tokens=2))

        async def agent(turns: list[tuple[list[int], int, float]]) -> None:
            log: list[int] = []
            for new, num_output, wait_s in turns:
                log += new
                options = GenerateOptions(max_tokens=num_output, ignore_eos=True)
                log += (await engine.generate(log, options)).token_ids
                async with engine.pause(log, "tool"):
                    await asyncio.sleep(wait_s)

        begin = time.perf_counter()
        await asyncio.gather(*(agent(turns) for turns in agents))
        wall_s = time.perf_counter() - begin
        stats = engine.stats()
        await engine.check()
        return {
            "wall_s": wall_s,
            "computed": stats.computed_tokens,
            "device": stats.cached_tokens,
            **{tier: stats.loaded_tokens.get(tier, 0) for tier in ("host", "disk")},
        }


async def price(folder: Path, repeats: int) -> float:
    """Wall time with tiers on over wall time with them off, for prompts that never hit."""
    walls: dict[bool, list[float]] = {True: [], False: []}
    for number in range(repeats):
        for tiers in (False, True):
            rng = random.Random(number)
            prompts = [[rng.randrange(1000, 40000) for _ in range(700)] for _ in range(6)]
            agents: Rows = [[(ids, 16, 0.0)] for ids in prompts]
            config = EngineConfig(
                cache_dir=folder,
                host_kv_bytes=1 << 30 if tiers else 0,
                disk_kv_bytes=2 << 30 if tiers else 0,
            )
            walls[tiers].append((await run(agents, config))["wall_s"])
    return statistics.median(walls[True]) / statistics.median(walls[False])


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    agents = workload(arguments.shared, arguments.agents, arguments.turns, arguments.wait_scale)
    async with Engine(config=EngineConfig(disk_kv_bytes=0)) as engine:
        token_bytes = engine.resolved.kv_token_bytes
        block_bytes = engine.resolved.block_tokens * token_bytes
    pool_bytes = working_set_tokens(agents) * token_bytes // 3
    pool_bytes += -pool_bytes % block_bytes
    common = {"device_kv_bytes": pool_bytes, "disk_kv_bytes": 0}
    configs = {
        "recompute": EngineConfig(host_kv_bytes=0, **common),
        "lru": EngineConfig(host_kv_bytes=pool_bytes, eviction="lru", **common),
        "worth": EngineConfig(host_kv_bytes=pool_bytes, **common),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for _ in range(arguments.repeats):
        for name, config in configs.items():
            runs[name].append(await run(agents, config))
            print(name, runs[name][-1], flush=True)
    results: dict[str, Any] = {
        name: min(each, key=lambda result: result["wall_s"]) for name, each in runs.items()
    }
    with tempfile.TemporaryDirectory() as name:
        results["price"] = await price(Path(name), arguments.price_repeats)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--wait-scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--price-repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    worth = results["worth"]["wall_s"]
    for name in ("recompute", "lru", "worth"):
        row = results[name]
        walls = f"{name:10} wall {row['wall_s']:7.1f} s, of which worth takes"
        print(f"{walls} {worth / row['wall_s']:.2f}; prompt tokens computed {row['computed']:,},")
        print(f"{'':11}from the device {row['device']:,}, from the host {row['host']:,}")
    print(f"tiers on over tiers off, where nothing hits: {results['price']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
