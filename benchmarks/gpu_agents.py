"""The airline agents on a GPU, through the public API.

    python benchmarks/gpu_agents.py SHAPE --shared DIR [--out FILE] [--set NAME=VALUE ...]
        [--kv-tokens N] [--runs AGENTS:CONCURRENCY:WAITS ...]

SHAPE is what `gpu_decode.py` takes. DIR/bench/replay.py drives it as it drives the peers.
`--kv-tokens` caps the device's KV pool. Without `--runs`: all agents, 32 at once, waits x0.2; and
the first 8 one by one without waits.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from gpu_decode import options, parser_of, report, subject

from agentrt import Engine, EngineConfig

RUNS = ("100:32:0.2", "8:1:0")


async def measure(
    model: str, trace: Path, given: dict[str, Any], runs: list[str]
) -> dict[str, Any]:
    import replay

    config = EngineConfig(**given)
    result: dict[str, Any] = {"config": given}
    rows = replay.load(str(trace))
    for run in runs:
        agents, concurrency, scale = run.split(":")
        async with Engine(model, config) as engine:

            async def generate(_agent: str, ids: list[int], num: int) -> tuple[float, list[int]]:
                begin, first, out = time.perf_counter(), None, []
                async for event in engine.stream(ids, options(num)):
                    if first is None:
                        first = time.perf_counter() - begin
                    out += getattr(event, "token_ids", ())
                return first or 0.0, out

            await generate("warm", list(range(1000, 1300)), 4)
            report = await replay.replay(
                rows[: int(agents)], generate, concurrency=int(concurrency), wait_scale=float(scale)
            )
            stats = engine.stats()
        summary = report.summary()
        summary |= {
            "steps": stats.steps,
            "preempted": stats.preempted,
            "step_s": round(stats.step_s, 2),
            "forward_s": round(stats.forward_s, 2),
        }
        result[run] = summary
        print(run, json.dumps(summary), flush=True)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    arguments = parser.parse_args()
    model, spec, given = subject(arguments)
    if arguments.kv_tokens:
        per_token = 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        given["device_kv_bytes"] = arguments.kv_tokens * per_token
    trace = arguments.shared / "traces" / "tau_airline_tokens.jsonl.gz"
    report(arguments, asyncio.run(measure(model, trace, given, list(arguments.runs))))


if __name__ == "__main__":
    main()
