"""The command `bench`: a workload of agents is replayed, and a table says how it went."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import anyio.to_thread

from agentrt.cli_engine import add_command, add_random_weights, open_engine
from agentrt.cli_workload import Report, builtin_workload, read_workload, replay
from agentrt.trace_record import record

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands
    from agentrt.engine import Engine

Rows = list[tuple[str, str]]


def add_bench_parser(commands: Commands) -> None:
    """`bench [WORKLOAD]`."""
    parser = add_command(commands, "bench", "replay a workload of agents and print a table", _bench)
    add_random_weights(parser)
    parser.add_argument(
        "workload",
        nargs="?",
        metavar="WORKLOAD",
        help=".jsonl or .jsonl.gz, an agent a line: "
        '{"id", "segments": [["in"|"out", token ids, seconds to wait after], ...]}; '
        "without it a small one that is built in",
    )
    add = parser.add_argument
    add("--agents", type=int, default=4, metavar="N", help="the first N agents (%(default)s)")
    add("--concurrency", type=int, default=4, metavar="N", help="agents at a time (%(default)s)")
    add("--record", metavar="JSONL", help="record the run, for the command `trace`")
    add("--wait-scale", type=float, default=1.0, metavar="X", help="waits times X (%(default)s)")


async def _bench(arguments: argparse.Namespace) -> None:
    path = arguments.workload
    async with open_engine(arguments) as engine:
        read = partial(builtin_workload, engine) if path is None else partial(read_workload, path)
        rows = await anyio.to_thread.run_sync(read, arguments.agents)
        path = arguments.record
        async with nullcontext() if path is None else record(engine, path):
            report = await replay(
                engine, rows, concurrency=arguments.concurrency, wait_scale=arguments.wait_scale
            )
        table = _table(engine, report)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}}  {value}")


def _table(engine: Engine, report: Report) -> Rows:
    stats, turns = engine.stats(), report.turns
    ttft_s, total_s = [turn.ttft_s for turn in turns], [turn.total_s for turn in turns]
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    cached_tokens = sum(turn.cached_tokens for turn in turns)
    output_tokens = sum(turn.output_tokens for turn in turns)
    return [
        ("model", f"{stats.model} ({stats.kernels}, weights {stats.weights})"),
        ("agents", f"{len(report.agent_s)}, {report.num_cut} cut at the context's end"),
        ("turns", f"{len(turns)}"),
        ("wall", f"{report.wall_s:.2f} s"),
        ("agent, median / 95 %", _quantiles(report.agent_s, "s")),
        ("first token, median / 95 %", _quantiles(ttft_s, "ms")),
        ("turn, median / 95 %", _quantiles(total_s, "ms")),
        ("prompt tokens", f"{prompt_tokens:,}"),
        ("  of them from the cache", f"{cached_tokens:,} ({_share(cached_tokens, prompt_tokens)})"),
        ("  of them computed", f"{prompt_tokens - cached_tokens:,}"),
        ("output tokens", f"{output_tokens:,} ({output_tokens / report.wall_s:.1f} a second)"),
    ]


def _quantiles(seconds: list[float], unit: str) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    scale = 1000 if unit == "ms" else 1
    values = [scale * ordered[int(share * (len(ordered) - 1) + 0.5)] for share in (0.5, 0.95)]
    return " / ".join(f"{value:,.1f}" for value in values) + f" {unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
