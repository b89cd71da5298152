"""Agents on a CPU: agentrt against llama.cpp, on the same work in the same run.

    python benchmarks/cpu_agents.py --shared DIR [--peer-python PYTHON] [--agents 4] [--json FILE]

DIR holds bench/replay.py, bench/peer_llamacpp.py and traces/tau_airline_tokens.jsonl.gz. PYTHON is
an interpreter that has llama-cpp-python 0.3.36; without it agentrt alone is measured. Prefill and
decode are measured before and after the peer's run, and the median is quoted. Times are of this
machine at this hour: read the ratios.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from agentrt import Engine, EngineConfig, Finished, GenerateOptions, TextDelta
from agentrt.config import default_cache_dir
from agentrt.registry import locate

MAX_CONTEXT = 7680
WAIT_SCALE = 0.2
# Nothing of an earlier run; no drafts, which the text that is made here, without end, would favour.
COLD = EngineConfig(disk_kv_bytes=0, speculation=False)


def load_replay(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay", shared / "bench" / "replay.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["replay"] = module
    spec.loader.exec_module(module)
    return module


async def generate(engine: Engine, ids: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """(seconds to the first token, output ids)."""
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    begin, first_s, out = time.perf_counter(), None, []
    async for event in engine.stream(ids, options):
        if isinstance(event, TextDelta):
            first_s = first_s or time.perf_counter() - begin
            out += event.token_ids
        elif isinstance(event, Finished):
            assert list(event.completion.token_ids) == out
    assert first_s is not None
    return first_s, out


async def measure_single(rows: list[dict[str, Any]], repeats: int) -> dict[str, float]:
    """Prefill of 2,048 tokens, and decode at that context, as the peer's driver measures them."""
    ids = [i for _, segment, _ in rows[0]["segments"] for i in segment][:2048]
    prefill, decode = [], []
    for _ in range(repeats):
        async with Engine(config=COLD) as engine:
            await generate(engine, ids[:64], 4)
            begin = time.perf_counter()
            await generate(engine, ids, 1)
            prefill.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            await generate(engine, ids, 65)
            decode.append(1e3 * (time.perf_counter() - begin) / 65)
    return {"prefill_2048_s": statistics.median(prefill), "decode_ms": statistics.median(decode)}


async def measure_agents(shared: Path, num_agents: int, concurrency: int) -> dict[str, Any]:
    replay = load_replay(shared)
    rows = replay.load(shared / "traces" / "tau_airline_tokens.jsonl.gz", num_agents)
    async with Engine(config=COLD) as engine:

        async def one(_: str, ids: list[int], num_tokens: int) -> tuple[float, list[int]]:
            return await generate(engine, ids, num_tokens)

        report = await replay.replay(
            rows, one, concurrency=concurrency, wait_scale=WAIT_SCALE, max_context=MAX_CONTEXT
        )
        stats = engine.stats()
        await engine.check()
    summary: dict[str, Any] = report.summary()
    computed = stats.computed_tokens + stats.recomputed_tokens
    new = summary["new_tokens"]
    return summary | {
        "computed_tokens": computed,
        "computed_over_new": round(computed / new, 4),
        "cached_tokens": stats.cached_tokens,
        "preempted": stats.preempted,
        "overhead": round(stats.overhead, 4),
    }


def measure_peer(
    python: str, shared: Path, num_agents: int, concurrency: int, *, states: bool
) -> dict[str, Any]:
    model = locate("smollm2-135m", default_cache_dir())
    driver = shared / "bench" / "peer_llamacpp.py"
    trace = shared / "traces" / "tau_airline_tokens.jsonl.gz"
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    if states:
        environment["STATES"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        command = [python, driver, model, trace, out, num_agents, concurrency]
        subprocess.run(list(map(str, command)), check=True, env=environment, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(out.read_text())
    return result | {"agents": result[f"agents{num_agents}_c{concurrency}"]}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    shared, agents = arguments.shared, arguments.agents
    rows = load_replay(shared).load(shared / "traces" / "tau_airline_tokens.jsonl.gz", 1)
    results: dict[str, Any] = {"single": await measure_single(rows, 3)}
    for concurrency in arguments.concurrency:
        results[f"c{concurrency}"] = await measure_agents(shared, agents, concurrency)
        print(json.dumps(results), file=sys.stderr, flush=True)
        if arguments.peer_python:
            peer = measure_peer(
                arguments.peer_python, shared, agents, concurrency, states=concurrency > 1
            )
            results[f"peer_c{concurrency}"] = peer
            again = await measure_single(rows, 3)
            results["single"] = {k: (v + again[k]) / 2 for k, v in results["single"].items()}
    return results


def table(results: dict[str, Any]) -> list[str]:
    """One line a measure: agentrt, the peer, their ratio."""
    lines = [f"{'':34}{'agentrt':>10}{'llama.cpp':>11}{'ratio':>8}"]

    def add(name: str, ours: float, theirs: float | None) -> None:
        peer = f"{theirs:11.2f}{ours / theirs:8.2f}" if theirs else ""
        lines.append(f"{name:34}{ours:10.2f}{peer}")

    peers = [value for key, value in results.items() if key.startswith("peer_")]
    for name, key, peer_key in (
        ("prefill of 2,048 tokens, s", "prefill_2048_s", "prefill_2048_s"),
        ("decode at 2,048, ms a token", "decode_ms", "decode_ms_ctx2048"),
    ):
        theirs = statistics.median(peer[peer_key] for peer in peers) if peers else None
        add(name, results["single"][key], theirs)
    for key in [key for key in results if key.startswith("c")]:
        peer = results.get(f"peer_{key}")
        ours = results[key]
        label = f"{ours['agents']} agents, concurrency {key[1:]}, wall s"
        add(label, ours["wall_s"], peer and peer["agents"]["wall_s"])
        lines.append(f"    computed / new prompt tokens: {ours['computed_over_new']:.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    print("\n".join(table(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
