"""A workload: what agents read and write, turn by turn, and its replay on an engine."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import time
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio
from attrs import define, field, frozen

from agentrt.errors import RequestInvalid
from agentrt.observer import Scope, agent
from agentrt.types import GenerateOptions, ToolCall
from agentrt.workload_budget import Accesses

if TYPE_CHECKING:
    from agentrt.engine import Engine

_SYSTEM = """\
You are a support agent of a small airline. Be short and polite. Before you change a booking, look
it up, say what you will change, and ask for a yes. Never promise what the tools do not say. Economy
tickets may be changed up to a day before the flight; business tickets at any time. A gold member
has three free bags, a silver member two, a regular member one; each further bag costs 50 dollars.
Refunds go to the card that paid, within a week. If you cannot help, say so, and pass the customer
on to a person.
"""
_TURNS = [
    "Hello, this is customer {i}. I would like to know about my booking NO{i:04}.",
    "Tool result: booking NO{i:04}, New York to Seattle on May 20, economy, one bag, gold member.",
    "Thank you. Please add a second bag, and tell me what it costs.",
    "Tool result: booking NO{i:04} has two bags now, 0 dollars.",
]
_BUILTIN_OUTPUT_TOKENS = 24
_BUILTIN_WAIT_S = 0.1


@frozen
class Segment:
    """Tokens that an agent reads ("in"), or that many which it writes ("out"), then a wait."""

    kind: Literal["in", "out"]
    ids: tuple[int, ...]
    wait_s: float


@frozen
class AgentRow:
    """One agent of a workload."""

    id: str
    segments: tuple[Segment, ...]
    arrival_s: float = 0.0


@frozen(kw_only=True)
class Turn:
    """What one generation cost. `at_s` is when it was asked for, from the replay's beginning."""

    at_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float
    total_s: float


@define
class Report:
    """What a replay measured; `num_cut` agents had more turns than the context holds."""

    turns: list[Turn] = field(factory=list)
    accesses: Accesses = field(factory=Accesses)
    agent_s: list[float] = field(factory=list)
    num_cut: int = 0
    wall_s: float = 0.0


def read_workload(path: str, num_agents: int) -> list[AgentRow]:
    """The first agents of a file. Raises RequestInvalid, naming the line."""
    _check_at_least_one("agents", num_agents)
    rows: list[AgentRow] = []
    try:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
            for number, line in enumerate(itertools.islice(lines, num_agents), 1):
                rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise RequestInvalid(f"the workload {path} cannot be read: {exc}") from exc
    return rows


def _row(line: str, where: str) -> AgentRow:
    try:
        row = json.loads(line)
        segments = tuple(_segment(*each) for each in row["segments"])
        return AgentRow(str(row["id"]), segments)
    except (ValueError, TypeError, KeyError) as exc:
        raise RequestInvalid(f"{where}: not an agent of a workload: {exc!r}") from exc


def _segment(kind: Any, ids: Any, wait_s: Any) -> Segment:
    if kind not in ("in", "out"):
        raise ValueError(f"a segment is 'in' or 'out', not {kind!r}")
    return Segment(cast(Literal["in", "out"], kind), tuple(ids), float(wait_s))


def builtin_workload(engine: Engine, num_agents: int) -> list[AgentRow]:
    """A small workload from text, so that any machine has one: agents share a system prompt."""
    _check_at_least_one("agents", num_agents)
    return [_builtin_row(engine, number) for number in range(1, num_agents + 1)]


def _builtin_row(engine: Engine, number: int) -> AgentRow:
    segments = []
    for text in [_SYSTEM + _TURNS[0], *_TURNS[1:]]:
        ids = _encode(engine, text.format(i=number))
        segments.append(Segment("in", ids, 0.0))
        segments.append(Segment("out", (0,) * _BUILTIN_OUTPUT_TOKENS, _BUILTIN_WAIT_S))
    return AgentRow(str(number), tuple(segments))


def _encode(engine: Engine, text: str) -> tuple[int, ...]:
    try:
        return tuple(engine.tokenizer.encode(text))
    except RequestInvalid:  # a shape without a tokenizer: any ids do
        return tuple(text.encode())


async def replay(
    engine: Engine, rows: list[AgentRow], *, concurrency: int, wait_scale: float
) -> Report:
    """Run the agents, so many at a time.

    Each output is asked for to its full length, the end of text ignored, and appended as generated:
    the work is the same on every engine. An agent ends where its context is full.
    """
    _check_at_least_one("concurrency", concurrency)
    if not 0 <= wait_scale < float("inf"):
        raise RequestInvalid(f"wait-scale must be at least 0, got {wait_scale}")
    report, gate, begin_s = Report(), asyncio.Semaphore(concurrency), time.perf_counter()

    async def run(row: AgentRow) -> None:
        await asyncio.sleep(max(0.0, row.arrival_s - (time.perf_counter() - begin_s)))
        async with gate:
            agent_begin_s = time.perf_counter()
            with agent(row.id):
                report.num_cut += not await _run_agent(engine, row, wait_scale, report, begin_s)
            report.agent_s.append(time.perf_counter() - agent_begin_s)

    try:
        async with anyio.create_task_group() as group:
            for row in rows:
                group.start_soon(run, row)
    except* RequestInvalid as errors:  # the first says it; it is the same for all
        raise errors.exceptions[0] from None
    report.wall_s = time.perf_counter() - begin_s
    return report


async def _run_agent(
    engine: Engine, row: AgentRow, wait_scale: float, report: Report, begin_s: float
) -> bool:
    """False if the context was full before the agent's end."""
    resolved, ids = engine.resolved, list[int]()
    limit = min(resolved.max_context_tokens, resolved.pool_tokens - resolved.block_tokens)
    for segment in row.segments:
        if len(ids) + len(segment.ids) > limit:
            return False
        if segment.kind == "in":
            ids += segment.ids
            continue
        options = GenerateOptions(max_tokens=len(segment.ids), ignore_eos=True)
        at_s = time.perf_counter() - begin_s
        report.accesses.note(ids)
        done = await engine.generate(ids, options)
        usage = done.usage
        report.turns.append(
            Turn(
                at_s=at_s,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=sum(usage.cached_tokens.values()),
                output_tokens=usage.output_tokens,
                ttft_s=usage.ttft_s,
                total_s=usage.total_s,
            )
        )
        ids += done.token_ids
        if segment.wait_s * wait_scale > 0:
            with engine._open.loop.observers.tool(Scope(row.id), ToolCall("", "wait", {})):
                await asyncio.sleep(segment.wait_s * wait_scale)
    return True


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise RequestInvalid(f"{name} must be at least 1, got {value}")
