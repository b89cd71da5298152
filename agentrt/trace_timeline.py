"""A recording as a timeline: what each agent did when, and how full the engine was."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from attrs import define, field, frozen

from agentrt.errors import RequestInvalid

Line = dict[str, Any]
Kind = Literal["queue", "prefill", "decode", "tool"]
TIERS = ("device", "host", "disk", "computed")


@frozen
class Span:
    """An agent did one thing from `begin_s` to `end_s`, counted from the recording's start."""

    kind: Kind
    begin_s: float
    end_s: float
    label: str


@frozen
class Row:
    """One agent's spans, in order of their begin."""

    agent: str
    spans: tuple[Span, ...]


@frozen(kw_only=True)
class BatchSize:
    """One step: requests in it by what they do, and its rows (tokens computed)."""

    begin_s: float
    end_s: float
    prefill: int
    decode: int
    rows: int


@frozen(kw_only=True)
class Sample:
    """Prompt tokens so far by origin, and the bytes that each tier holds."""

    at_s: float
    tokens: tuple[int, ...]  # as in TIERS
    bytes: tuple[int, ...]  # of device, host, disk
    output_tokens: int


@frozen(kw_only=True)
class Timeline:
    """A whole run."""

    header: Line
    seconds: float
    rows: tuple[Row, ...]
    steps: tuple[BatchSize, ...]
    samples: tuple[Sample, ...]
    num_requests: int


@define
class _Request:
    """What the lines say of one request."""

    submitted: Line
    steps: list[tuple[Kind, float, float]] = field(factory=list)
    ended: Line | None = None


def timeline(lines: Sequence[Line]) -> Timeline:
    """The timeline of a recording's lines (see `trace_record.read_lines`).

    Raises RequestInvalid where a line lacks what its kind has.
    """
    try:
        return _timeline(lines)
    except (KeyError, TypeError, ValueError) as exc:
        raise RequestInvalid(f"the recording is damaged: {exc!r}") from exc


def _timeline(lines: Sequence[Line]) -> Timeline:
    start = lines[0]["at"]
    end = max(_last_moment(line) for line in lines)
    by_kind: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_kind[line["kind"]].append(line)
    requests = _requests(by_kind)
    named: dict[str, list[Span]] = defaultdict(list)
    for request in requests:
        named[request.submitted["agent"]] += _spans(request, start, end)
    for tool in by_kind["tool"]:
        tool_end = end if tool["end"] is None else tool["end"]
        label = f"tool {tool['name']}" + (" (error)" if tool.get("is_error") else "")
        named[tool["agent"]].append(Span("tool", tool["begin"] - start, tool_end - start, label))
    unnamed = [_spans(each, start, end) for each in requests if not each.submitted["agent"]]
    named.pop("", None)
    rows = [Row(agent, _ordered(spans)) for agent, spans in named.items() if spans]
    rows += [Row(f"unnamed {i}", _ordered(lane)) for i, lane in enumerate(_packed(unnamed), 1)]
    return Timeline(
        header=lines[0],
        seconds=end - start,
        rows=tuple(sorted(rows, key=lambda row: row.spans[0].begin_s)),
        steps=tuple(_batch_size(step, start) for step in by_kind["step"]),
        samples=tuple(_sample(line, start) for line in by_kind["sample"]),
        num_requests=len(requests),
    )


def _last_moment(line: Line) -> float:
    return float(line.get("at") or line.get("end") or line["begin"])


def _requests(by_kind: dict[str, list[Line]]) -> list[_Request]:
    """In order of submission; those that were submitted before the recording began are left out."""
    found = {line["request"]: _Request(line) for line in by_kind["submitted"]}
    for step in by_kind["step"]:
        for request_id, _ in step["prefill"]:
            if request_id in found:
                found[request_id].steps.append(("prefill", step["begin"], step["end"]))
        for request_id in step["decode"]:
            if request_id in found:
                found[request_id].steps.append(("decode", step["begin"], step["end"]))
    for line in by_kind["ended"]:
        if line["request"] in found:
            found[line["request"]].ended = line
    return list(found.values())


def _spans(request: _Request, start: float, end: float) -> list[Span]:
    """Queue until its first step, then a span for each run of steps of one kind. After a
    preemption it queues again: its decode is followed by prefill."""
    ended_s = (end if request.ended is None else request.ended["at"]) - start
    label, at_s = _label(request), request.submitted["at"] - start
    spans: list[Span] = []
    for kind, group in itertools.groupby(request.steps, key=lambda step: step[0]):
        steps = list(group)
        begin_s = max(at_s, steps[0][1] - start)
        if begin_s > at_s and (not spans or kind == "prefill"):
            spans.append(Span("queue", at_s, begin_s, label))
        elif spans:
            begin_s = at_s  # what lies between two kinds of steps is the engine's own time
        at_s = max(begin_s, min(steps[-1][2] - start, ended_s))
        spans.append(Span(kind, begin_s, at_s, label))
    if not spans:
        spans.append(Span("queue", at_s, max(at_s, ended_s), label))
    return spans


def _label(request: _Request) -> str:
    name = f"{request.submitted['request']}: {request.submitted['prompt_tokens']} prompt tokens"
    if request.ended is None:
        return f"{name}, not ended"
    ended = request.ended
    tokens = ", ".join(f"{count} {tier}" for tier, count in ended["tokens"].items() if count)
    return f"{name} ({tokens}), {ended['output_tokens']} output tokens, {ended['reason']}"


def _ordered(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(sorted(spans, key=lambda span: (span.begin_s, span.end_s)))


def _packed(requests: Iterable[list[Span]]) -> list[list[Span]]:
    """Requests of nobody in particular: as few lanes as hold them side by side."""
    lanes: list[list[Span]] = []
    for spans in requests:
        free = next((lane for lane in lanes if lane[-1].end_s <= spans[0].begin_s), None)
        if free is None:
            lanes.append(free := [])
        free += spans
    return lanes


def _batch_size(step: Line, start: float) -> BatchSize:
    return BatchSize(
        begin_s=step["begin"] - start,
        end_s=step["end"] - start,
        prefill=len(step["prefill"]),
        decode=len(step["decode"]),
        rows=step["rows"],
    )


def _sample(line: Line, start: float) -> Sample:
    return Sample(
        at_s=line["at"] - start,
        tokens=tuple(line["tokens"].get(tier, 0) for tier in TIERS),
        bytes=tuple(line["bytes"][tier] for tier in TIERS[:3]),
        output_tokens=line["output_tokens"],
    )
