"""Agents in a device pool that holds a third of what they work on, on a CPU with SmolLM2.

    python benchmarks/pressure.py --shared DIR [--agents 24] [--turns 6] [--virtual] [--json FILE]

The first turns of the airline workload's agents, all at once. Waits are scaled, and a tenth of them
take 20 times the median. Three engines in one run, in turn, that admit requests in the same order
(`agentrt.order`), with the same device pool, a third of the agents' working set:
- `recompute` has no tier below the device. It evicts by worth, and is told when tools run.
- `lru` is plain LRU offload: each turn's KV is copied to the host tier when the turn ends, and both
  tiers evict by age alone.
- `worth` is the default: what the device evicts goes to the host tier, which has as many bytes as
  that of `lru`, and both evict by worth, told when tools run and who is next in the queue.
Then the price of the tiers for a workload that never hits: distinct prompts, tiers on and off.

`--virtual` runs the same three in virtual time (`virtual_engine`), with six mixes of what prefill
and decoding cost: it counts tokens, and tells in seconds what a change of policy does.
"""

import argparse
import asyncio
import gzip
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from replay_all import num_shared_tokens
from virtual_engine import KV_TOKEN_BYTES, Costs, VirtualEngine

from agentrt import Engine, EngineConfig, Finished, GenerateOptions
from agentrt.config import BLOCK_TOKENS, default_cache_dir
from agentrt.registry import locate

MEDIAN_WAIT_S = 0.5
SLOW_SHARE, SLOW_FACTOR = 0.1, 20
# What a prefill token and a step cost, as parts of what they do by default.
MIXES = ((0.85, 1.0), (0.95, 1.1), (1.0, 1.0), (1.05, 0.9), (1.15, 1.2), (1.25, 1.0))
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


async def run(
    agents: Rows, config: EngineConfig, warm_up: Sequence[list[int]] = ([1, 2, 3],)
) -> dict[str, Any]:
    async with Engine(str(locate("smollm2-135m", default_cache_dir())), config) as engine:
        for prompt in warm_up:
            await engine.generate(prompt, GenerateOptions(max_tokens=2))

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
            "computed": stats.computed_tokens + stats.recomputed_tokens,
            "device": stats.cached_tokens,
            **stats.loaded_tokens,
        }


async def price(folder: Path, repeats: int) -> float:
    """Wall time with tiers on over wall time with them off, for prompts that never hit: the median
    over pairs of runs, in turn the one and the other first. Both tiers are full when it begins, as
    they are most of the time: memory that the system must clear first is a price paid once."""
    ratios = []
    for number in range(repeats):
        rng = random.Random(number)
        prompts = [[rng.randrange(1000, 40000) for _ in range(700)] for _ in range(20)]
        agents: Rows = [[(ids, 16, 0.0)] for ids in prompts[8:]]
        walls = {}
        for tiers in (number % 2 == 0, number % 2 == 1):
            config = EngineConfig(
                cache_dir=folder,
                host_kv_bytes=64 << 20 if tiers else 0,
                disk_kv_bytes=128 << 20 if tiers else 0,
            )
            walls[tiers] = (await run(agents, config, prompts[:8]))["wall_s"]
        ratios.append(walls[True] / walls[False])
        print(f"price {ratios[-1]:.3f}", flush=True)
    return statistics.median(ratios)


class VirtualAgent:
    """One agent over a VirtualEngine: a turn, a pause, the next turn."""

    def __init__(self, engine: VirtualEngine, number: int, turns: Any) -> None:
        self._engine, self._number, self._turns = engine, number, iter(turns)
        self._log: list[int] = []

    def go_on(self) -> None:
        turn = next(self._turns, None)
        if turn is not None:
            new, num_output, self._wait_s = turn
            self._log += new
            self._engine.request(self._log, num_output, self._hear)

    def _hear(self, event: Any) -> None:
        if isinstance(event, Finished):
            self._log += event.completion.token_ids
            engine, pauses = self._engine, self._engine.loop.scheduler.pauses
            ids = np.array(self._log, np.int32)
            engine.loop.tell(lambda: pauses.begin(self._number, ids, "tool", engine.now))
            engine.at(engine.now + self._wait_s, self._end_pause)

    def _end_pause(self) -> None:
        engine, pauses = self._engine, self._engine.loop.scheduler.pauses
        engine.loop.tell(lambda: pauses.end(self._number, engine.now))
        self.go_on()


def run_virtual(agents: Rows, config: EngineConfig, costs: Costs, seed: int = 0) -> dict[str, Any]:
    engine = VirtualEngine(config, costs, seed)
    for number, turns in enumerate(agents):
        VirtualAgent(engine, number, turns).go_on()
    engine.run()
    origins = engine.loop.scheduler.origins
    return {
        "wall_s": engine.now,
        "computed": origins.computed + origins.again,
        "device": origins.tiers["device"],
        "host": origins.tiers["host"],
    }


def mean_virtual(agents: Rows, config: EngineConfig) -> dict[str, Any]:
    """The mean over MIXES: one run alone hangs on who came first by a millisecond."""
    default = Costs()
    runs = [
        run_virtual(
            agents,
            config,
            Costs(prefill_token_s=default.prefill_token_s * prefill, step_s=default.step_s * step),
            seed,
        )
        for seed, (prefill, step) in enumerate(MIXES)
    ]
    return {name: statistics.mean(run[name] for run in runs) for name in runs[0]}


def three_configs(agents: Rows, token_bytes: int, block_tokens: int) -> dict[str, EngineConfig]:
    block_bytes = block_tokens * token_bytes
    pool_bytes = working_set_tokens(agents) * token_bytes // 3
    pool_bytes += -pool_bytes % block_bytes
    common = {"device_kv_bytes": pool_bytes, "disk_kv_bytes": 0, "block_tokens": block_tokens}
    return {
        "recompute": EngineConfig(host_kv_bytes=0, **common),
        "lru": EngineConfig(host_kv_bytes=pool_bytes, eviction="lru", **common),
        "worth": EngineConfig(host_kv_bytes=pool_bytes, **common),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    agents = workload(arguments.shared, arguments.agents, arguments.turns, arguments.wait_scale)
    if arguments.virtual:
        configs = three_configs(agents, KV_TOKEN_BYTES, BLOCK_TOKENS["cpu"])
        return {name: mean_virtual(agents, config) for name, config in configs.items()}
    async with Engine(config=EngineConfig(disk_kv_bytes=0)) as engine:
        resolved = engine.resolved
    configs = three_configs(agents, resolved.kv_token_bytes, resolved.block_tokens)
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
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    worth = results["worth"]["wall_s"]
    for name in ("recompute", "lru", "worth"):
        row = results[name]
        walls = f"{name:10} wall {row['wall_s']:7.1f} s, of which worth takes"
        print(
            f"{walls} {worth / row['wall_s']:.2f}; prompt tokens computed {row['computed']:,.0f},"
        )
        print(f"{'':11}from the device {row['device']:,.0f}, from the host {row['host']:,.0f}")
    if "price" in results:
        print(f"tiers on over tiers off, where nothing hits: {results['price']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
