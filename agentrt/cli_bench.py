"""The command `bench`: a workload of agents is replayed, and a table says how it went."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from agentrt.cli_bench_plot import plot
from agentrt.cli_engine import add_command, add_random_weights, open_engine
from agentrt.cli_workload import AgentRow, Report, builtin_workload, read_workload, replay
from agentrt.errors import RequestInvalid
from agentrt.trace_record import record
from agentrt.workload import SHAPES, Sampling, find_shape, sample
from agentrt.workload_budget import budgets

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands
    from agentrt.engine import Engine

Rows = list[tuple[str, str]]
PERCENTILES = (0.5, 0.9, 0.95, 0.99)
BUDGET_SHARES = (0.5, 0.9, 0.99)


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
    add(
        "--shape",
        metavar="NAME",
        help=f"{', '.join(SHAPES)}, or a JSON file with a shape's fields (coding is the longer "
        "conversations of chat's trace: no trace of coding agents was at hand)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of a shape's agents (%(default)s)")
    add("--rate", type=float, metavar="N", help="agents a second (default: the shape's own)")
    add("--tokens-scale", type=float, default=1.0, metavar="X", help="a shape's lengths times X")
    add("--time-scale", type=float, default=1.0, metavar="X", help="its waits and gaps times X")
    add("--plot", type=Path, metavar="PNG", help="draw first tokens and hit rate over time")
    add("--record", metavar="JSONL", help="record the run, for the command `trace`")
    add("--wait-scale", type=float, default=1.0, metavar="X", help="waits times X (%(default)s)")


async def _bench(arguments: argparse.Namespace) -> None:
    if arguments.shape is not None and arguments.workload is not None:
        raise RequestInvalid("a workload and --shape exclude each other")
    is_open = arguments.shape is not None and arguments.concurrency is None
    concurrency = arguments.agents if is_open else arguments.concurrency or 4
    async with open_engine(arguments) as engine:
        rows = await anyio.to_thread.run_sync(_rows, engine, arguments)
        path = arguments.record
        async with nullcontext() if path is None else record(engine, path):
            report = await replay(
                engine, rows, concurrency=concurrency, wait_scale=arguments.wait_scale
            )
        table = _table(engine, report)
    if arguments.plot is not None:
        title = arguments.shape or arguments.workload or "built-in workload"
        await anyio.to_thread.run_sync(plot, report.turns, arguments.plot, title)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}}  {value}")


def _rows(engine: Engine, arguments: argparse.Namespace) -> list[AgentRow]:
    if arguments.workload is not None:
        return read_workload(arguments.workload, arguments.agents)
    if arguments.shape is None:
        return builtin_workload(engine, arguments.agents)
    sampling = Sampling(
        num_agents=arguments.agents,
        vocab_size=engine._open.spec.vocab_size,
        seed=arguments.seed,
        agents_per_s=arguments.rate,
        tokens_scale=arguments.tokens_scale,
        time_scale=arguments.time_scale,
    )
    shape = find_shape(arguments.shape)
    print(f"shape {shape.name}: {shape.source}")
    return list(sample(shape, sampling))


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
        ("agent, 50 / 90 / 95 / 99 %", _quantiles(report.agent_s, "s")),
        ("first token, 50 / 90 / 95 / 99 %", _quantiles(ttft_s, "ms")),
        ("turn, 50 / 90 / 95 / 99 %", _quantiles(total_s, "ms")),
        ("prompt tokens", f"{prompt_tokens:,}"),
        ("  of them from the cache", f"{cached_tokens:,} ({_share(cached_tokens, prompt_tokens)})"),
        ("  of them computed", f"{prompt_tokens - cached_tokens:,}"),
        ("output tokens", f"{output_tokens:,} ({output_tokens / report.wall_s:.1f} a second)"),
        *_budget_rows(engine, report),
    ]


def _budget_rows(engine: Engine, report: Report) -> Rows:
    """The cache that this run wants: of an LRU cache, since ours keeps more of what is wanted."""
    token_bytes = engine.resolved.kv_token_bytes
    found = budgets(report.accesses.keys, token_bytes, BUDGET_SHARES)
    if not found:
        return [("cache budget", "any: nothing was asked for twice")]
    mebibytes = " / ".join(f"{each.num_bytes / 2**20:,.1f}" for each in found)
    names = " / ".join(f"{100 * each.share:g}" for each in found)
    device = engine.resolved.pool_tokens * token_bytes / 2**20
    return [
        (f"cache for {names} % of reuse", f"{mebibytes} MiB"),
        (
            "cache budget",
            f"{found[-1].num_bytes:,} bytes over all tiers (device: {device:,.1f} MiB)",
        ),
    ]


def _quantiles(seconds: list[float], unit: str) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    scale = 1000 if unit == "ms" else 1
    values = [scale * ordered[int(share * (len(ordered) - 1) + 0.5)] for share in PERCENTILES]
    return " / ".join(f"{value:,.1f}" for value in values) + f" {unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
