"""What observers hear, recordings of it, and their timelines."""

import asyncio
import json
from collections import Counter

import pytest
from fakes import until
from recordings import CALL, HEADER, OPTIONS, SIZES, line, lines_of, look_up, recorded, submitted
from scripted import call_text, scripted

from agentrt import GenerateOptions, tool
from agentrt.__main__ import main
from agentrt.errors import RequestInvalid
from agentrt.observer import Observer, agent
from agentrt.trace_record import record
from agentrt.trace_timeline import timeline

# ---- observers


async def test_observers_hear_of_each_request_with_its_agent_and_turn(tokenizer, template):
    class Heard(Observer):
        def __init__(self):
            self.events = []

        def submitted(self, request, scope, now):
            self.events.append(("submitted", scope.agent, scope.turn))

        def ended(self, request, outcome, now):
            self.events.append(("ended", outcome))

        def turn_began(self, scope, now):
            self.events.append(("turn", scope.agent, scope.turn))

        def turn_ended(self, scope, error, now):
            self.events.append(("turn ended", error))

        def tool_began(self, scope, call, now):
            self.events.append(("tool", scope.agent, scope.turn, call.name))

        def tool_ended(self, scope, call, result, now):
            self.events.append(("tool ended", result.content))

    heard = Heard()
    async with scripted(tokenizer, template, [CALL, "It is 1.", "x", "y"], **SIZES) as engine:
        with engine._open.loop.observers.attached(heard):
            with agent("ada"):
                session = engine.session(tools=[look_up], options=OPTIONS)
            await session.run("What is a?")
            await engine.generate("plain", OPTIONS)
        await engine.generate("nobody listens", GenerateOptions(max_tokens=1))
    turn = heard.events[0][2]
    tools = [event for event in heard.events if event[0].startswith("tool")]
    assert tools == [("tool", "ada", turn, "look_up"), ("tool ended", "a is 1")]
    # A tool starts when its call is complete, which may be before its request has ended.
    assert [event for event in heard.events if event not in tools] == [
        ("turn", "ada", turn),
        ("submitted", "ada", turn),
        ("ended", "stop"),
        ("submitted", "ada", turn),
        ("ended", "stop"),
        ("turn ended", None),
        ("submitted", "", None),
        ("ended", "stop"),
    ]


async def test_what_a_tool_says_is_prefilled_in_the_name_of_its_agent(tokenizer, template):
    class Heard(Observer):
        def __init__(self):
            self.scopes, self.num_ended = [], 0

        def submitted(self, request, scope, now):
            self.scopes.append(scope)

        def ended(self, request, outcome, now):
            self.num_ended += 1

    spoken, heard = asyncio.Event(), Heard()

    @tool
    async def report():
        """Reports."""
        yield "a line of a long report\n" * 8
        await spoken.wait()
        yield "and its end"

    texts = [call_text("report"), "Thanks."]
    async with scripted(tokenizer, template, texts, **SIZES) as engine:
        with agent("ada"):
            session = engine.session(tools=[report], options=OPTIONS)
        with engine._open.loop.observers.attached(heard):
            turn = asyncio.create_task(session.run("go"))
            await until(lambda: heard.num_ended == 2)  # the call, and what was said so far
            spoken.set()
            await turn
    assert [scope.agent for scope in heard.scopes] == ["ada"] * 3
    assert len({scope.turn for scope in heard.scopes}) == 1


async def test_forks_are_agents_of_their_own(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello!"], **SIZES) as engine:
        with agent("ada"):
            session = engine.session(options=OPTIONS)
        await session.run("Hi")
        assert [twin.agent for twin in await session.fork(2)] == ["ada.1", "ada.2"]
        assert [twin.agent for twin in await session.fork(1)] == ["ada.3"]
        assert engine.session().agent != engine.session().agent


# ---- recordings


async def test_a_recording_adds_up_to_the_statistics(tokenizer, template, tmp_path):
    stats = await recorded(tokenizer, template, tmp_path / "run.jsonl", 3)
    lines = lines_of(tmp_path / "run.jsonl")
    by_kind = Counter(line["kind"] for line in lines)
    assert by_kind["submitted"] == by_kind["ended"] == stats.finished == 6
    assert by_kind["turn"] == by_kind["tool"] == 3
    assert by_kind["step"] == stats.steps
    steps = [line for line in lines if line["kind"] == "step"]
    prefilled = sum(tokens for step in steps for _, tokens in step["prefill"])
    assert prefilled == stats.computed_tokens
    assert all(step["rows"] >= len(step["prefill"]) + len(step["decode"]) for step in steps)
    ended = [line for line in lines if line["kind"] == "ended"]
    assert sum(line["tokens"]["device"] for line in ended) == stats.cached_tokens
    assert sum(line["output_tokens"] for line in ended) == stats.output_tokens
    last = [line for line in lines if line["kind"] == "sample"][-1]
    assert last["tokens"]["computed"] == stats.computed_tokens
    assert last["bytes"]["device"] == stats.kv_used_bytes


async def test_a_recording_holds_no_text(tokenizer, template, tmp_path):
    await recorded(tokenizer, template, tmp_path / "run.jsonl", 2)
    text = (tmp_path / "run.jsonl").read_text()
    assert "look_up" in text
    for said in ("What is a", "Be short", "It is 1", "a is 1", "arguments"):
        assert said not in text


async def test_a_cancelled_turn_and_what_runs_at_the_end_are_in_the_recording(
    tokenizer, template, tmp_path
):
    started, path = asyncio.Event(), tmp_path / "run.jsonl"

    @tool
    async def look_up(key: str) -> str:
        """Waits for ever."""
        started.set()
        await asyncio.Event().wait()

    async with scripted(tokenizer, template, [CALL], **SIZES) as engine:
        session = engine.session(tools=[look_up], options=OPTIONS)
        turn = asyncio.create_task(session.run("What is a?"))
        async with record(engine, path):
            await started.wait()
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
    ends = {line["kind"]: line for line in lines_of(path) if line.get("end", 0) is None}
    assert set(ends) <= {"tool", "turn"}
    (row,) = timeline(lines_of(path)).rows
    assert row.spans[-1].kind == "tool"
    assert row.spans[-1].end_s == pytest.approx(timeline(lines_of(path)).seconds)


async def test_a_recording_that_cannot_be_written_says_so(tokenizer, template, tmp_path):
    async with scripted(tokenizer, template, ["x"], **SIZES) as engine:
        with pytest.raises(RequestInvalid, match="cannot be written"):
            async with record(engine, tmp_path / "no" / "run.jsonl"):
                pass
        with pytest.raises(RequestInvalid, match=r"not whole.*No space"):
            async with record(engine, "/dev/full"):
                await engine.generate("hello", OPTIONS)


# ---- timelines


def step(begin, end, prefill=(), decode=()):
    chunks = [[request, 4] for request in prefill]
    rows = 4 * len(prefill) + len(decode)
    return line("step", begin=begin, end=end, rows=rows, prefill=chunks, decode=list(decode))


def ended(request, at):
    tokens = {"device": 0, "host": 0, "disk": 0, "computed": 4}
    facts = {"first_token": at, "tokens": tokens, "output_tokens": 1, "reason": "stop"}
    return line("ended", at=at, request=request, **facts)


def kinds(row):
    return [(s.kind, round(s.begin_s, 3), round(s.end_s, 3)) for s in row.spans]


def test_a_request_queues_is_prefilled_and_decodes():
    lines = [
        HEADER,
        submitted("r0", 10.0, "ada"),
        step(10.5, 11.0, ["r0"]),
        step(11.0, 11.5, ["r0"]),
        step(11.6, 12.0, [], ["r0"]),
        ended("r0", 12.0),
    ]
    (row,) = timeline(lines).rows
    assert kinds(row) == [("queue", 0, 0.5), ("prefill", 0.5, 1.5), ("decode", 1.5, 2.0)]


def test_a_preempted_request_queues_again():
    lines = [
        HEADER,
        submitted("r0", 10.0, "ada"),
        step(10.0, 11.0, ["r0"]),
        step(11.0, 12.0, [], ["r0"]),
        step(14.0, 15.0, ["r0"]),
        step(15.0, 16.0, [], ["r0"]),
        ended("r0", 16.0),
    ]
    (row,) = timeline(lines).rows
    assert [kind for kind, *_ in kinds(row)] == ["prefill", "decode", "queue", "prefill", "decode"]
    assert kinds(row)[2] == ("queue", 2, 4)


def test_requests_of_nobody_share_as_few_rows_as_hold_them():
    lines = [HEADER, submitted("r0", 10), submitted("r1", 10.5), submitted("r2", 12)]
    lines += [ended("r0", 11), ended("r1", 13), ended("r2", 12.5)]
    rows = timeline(lines).rows
    assert [row.agent for row in rows] == ["unnamed 1", "unnamed 2"]
    assert [len(row.spans) for row in rows] == [2, 1]


def test_a_request_that_never_ran_queues_to_the_end():
    (row,) = timeline([HEADER, submitted("r0", 10, "a"), line("end", at=15)]).rows
    assert kinds(row) == [("queue", 0, 5)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("no json\n", "line 1: not JSON"),
        ('{"kind": "step"}\n', "line 1: not a recording"),
        (json.dumps(HEADER | {"format": 99}) + "\n", "format 99"),
        (json.dumps(HEADER) + '\n{"kind": "step", "begin": 1}\n', "damaged"),
    ],
)
def test_what_is_no_recording_is_refused(text, why, tmp_path, capsys):
    (tmp_path / "run.jsonl").write_text(text)
    assert main(["trace", str(tmp_path / "run.jsonl")]) == 1
    assert why in capsys.readouterr().err
