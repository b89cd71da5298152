"""Early dispatch, approval, and tools whose output is prefilled while it streams."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import types
from collections.abc import Coroutine, Generator, Sequence
from typing import Any, Literal

import pytest
from attrs import evolve
from fakes import FakeEngine, until
from scripted import Script, call_text, scripted

from agentrt import (
    EngineConfig,
    GenerateOptions,
    TextDelta,
    ToolCallArguments,
    ToolCallDelta,
    ToolResult,
    TurnFinished,
    tool,
)
from agentrt.config import TOOL_FORMATS
from agentrt.errors import ConfigError, OutputInvalid, RequestInvalid
from agentrt.guards import Pass
from agentrt.parsers_families import FORMATS
from agentrt.session import Session
from agentrt.template import ChatTemplate
from agentrt.tool_prefill import LEAST_TOKENS
from agentrt.tool_runs import Approval, ToolRuns
from agentrt.tools import ToolSet
from agentrt.types import ToolCall

PLENTY = GenerateOptions(max_tokens=600)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


# ---- early dispatch


async def test_a_tool_starts_before_the_turns_last_token(tokenizer, template) -> None:
    """The engine is held after the first call: its tool runs while the second is not written."""
    ran = threading.Event()

    @tool
    async def early(n: int) -> str:
        """Runs at once."""
        ran.set()
        return str(n)

    text = call_text("early", '{"n": 1}')
    num_first = len(tokenizer.encode(text))
    async with scripted(tokenizer, template, [f"{text}\n{call_text('add')}", "ok"]) as engine:
        session = engine.session(tools=[early, add], options=PLENTY)
        engine.gate.close()
        task = asyncio.create_task(session.run("go"))
        while not ran.is_set():
            await engine.until_held()
            assert engine.runner.num_steps <= num_first + 20, "the turn was all but written"
            engine.gate.allow(1)
            await asyncio.sleep(0.001)
        assert not task.done()
        engine.gate.open()
        reply = await task
        assert reply.steps[0].results[0].content == "1"
        assert len(reply.steps[0].results) == 2


async def test_the_order_of_events_and_runs(tokenizer, template) -> None:
    happened: list[str] = []

    @tool
    async def free() -> str:
        """May run again."""
        happened.append("free")
        return "f"

    @tool(idempotent=False)
    async def once() -> str:
        """Must not run again."""
        happened.append("once")
        return "o"

    calls = [call_text("once"), call_text("free"), call_text("free")]
    async with scripted(tokenizer, template, ["\n".join(calls), "ok"]) as engine:
        session = engine.session(tools=[free, once], options=PLENTY)
        engine.gate.close()
        events = session.stream("go")
        seen: list[Any] = []

        async def read() -> None:
            async for event in events:
                if isinstance(event, ToolCallArguments):
                    happened.append(f"call {event.call.name}")
                seen.append(event)

        task = asyncio.create_task(read())
        while happened.count("call free") < 2:
            await engine.until_held()
            engine.gate.allow(1)
            await asyncio.sleep(0.001)
        engine.gate.open()
        await task
        # the first free one ran before the last call was written; what must not repeat, after it
        assert happened.index("free") < len(happened) - 1 - happened[::-1].index("call free")
        assert happened.index("once") > len(happened) - 1 - happened[::-1].index("call free")
        assert happened.index("call once") < happened.index("call free")
        results = [event.content for event in seen if isinstance(event, ToolResult)]
        assert results == ["o", "f", "f"]


# ---- approval


@pytest.mark.parametrize(
    ("answer", "content", "is_error"),
    [
        (True, "3", False),
        (False, "Error: not run: it was not approved", True),
        ("too dear", "Error: not run: too dear", True),
        (ToolCall("", "add", {"a": 5, "b": 5}), "10", False),
        (ToolCall("", "nobody", {}), "Error: no tool is named 'nobody'; known tools: add", True),
    ],
)
async def test_an_approval_vetoes_or_edits(tokenizer, template, answer, content, is_error) -> None:
    asked: list[ToolCall] = []

    async def approve(call: ToolCall) -> Any:
        asked.append(call)
        await asyncio.sleep(0)
        return answer

    texts = [call_text("add", '{"a": 1, "b": 2}'), "ok"]
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(tools=[add], options=PLENTY, approve=approve)
        reply = await session.run("go")
        (result,) = reply.steps[0].results
        assert (result.content, result.is_error) == (content, is_error)
        assert result.call.id == asked[0].id == session.messages[-2].tool_call_id
        assert asked[0].arguments == {"a": 1, "b": 2}
        assert reply.text == "ok"


async def test_a_vetoed_call_never_runs(tokenizer, template) -> None:
    ran: list[int] = []

    @tool
    async def act(n: int) -> str:
        """Acts."""
        ran.append(n)
        return "done"

    async def approve(call: ToolCall) -> bool:
        await asyncio.sleep(0.001 * call.arguments["n"])
        return call.arguments["n"] % 2 == 0

    texts = ["\n".join(call_text("act", f'{{"n": {n}}}') for n in range(4)), "ok"]
    async with scripted(tokenizer, template, texts) as engine:
        reply = await engine.session(tools=[act], options=PLENTY, approve=approve).run("go")
        assert sorted(ran) == [0, 2]
        assert [result.is_error for result in reply.steps[0].results] == [False, True, False, True]


async def test_nobody_approves_in_time(tokenizer, template) -> None:
    async def approve(_: ToolCall) -> bool:
        await asyncio.Event().wait()
        return True

    texts = [call_text("add", '{"a": 1, "b": 2}'), "ok"]
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(
            tools=[add], options=PLENTY, approve=approve, approve_timeout_s=0.01
        )
        reply = await session.run("go")
        assert reply.steps[0].results[0].content == (
            "Error: not run: nobody approved it within 0.01 s"
        )


async def test_an_approval_that_fails_or_answers_nonsense_fails_the_turn(
    tokenizer, template
) -> None:
    async def fail(_: ToolCall) -> bool:
        raise KeyError("mine")

    async def nonsense(_: ToolCall) -> Any:
        return 1

    for approve, error in ((fail, KeyError), (nonsense, RequestInvalid)):
        async with scripted(tokenizer, template, [call_text("add"), "ok"]) as engine:
            session = engine.session(tools=[add], options=PLENTY, approve=approve)
            with pytest.raises(error):
                await session.run("go")
            assert session.messages == []
            assert await engine.leased_blocks() == 0


async def test_cancelling_while_approval_is_awaited(tokenizer, template) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def approve(_: ToolCall) -> bool:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return True

    async with scripted(tokenizer, template, [call_text("add"), "ok"]) as engine:
        others = asyncio.all_tasks()
        session = engine.session(tools=[add], options=PLENTY, approve=approve)
        task = asyncio.create_task(session.run("go"))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        assert session.messages == []
        assert await engine.leased_blocks() == 0
        assert asyncio.all_tasks() == others


async def test_runs_end_with_their_owner() -> None:
    began, happened = asyncio.Event(), []

    @tool
    async def slow() -> str:
        """Waits."""
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            happened.append("ended")

    @tool(idempotent=False)
    async def late() -> str:
        """Waits to be released."""
        happened.append("late")
        return ""

    runs = ToolRuns(ToolSet([slow, late]), clock=time.monotonic)
    runs.start(ToolCall("a", "slow", {}))
    runs.start(ToolCall("b", "late", {}))
    await began.wait()
    await runs.aclose()
    assert happened == ["ended"]
    assert all(task.cancelled() for task in runs.tasks)
    await ToolRuns(ToolSet([slow])).aclose()


async def test_approval_keeps_the_calls_id() -> None:
    async def approve(_: ToolCall) -> ToolCall:
        return ToolCall("other", "b", {})

    assert await Approval(approve).decide(ToolCall("mine", "a", {})) == ToolCall("mine", "b", {})


# ---- tools that stream


async def test_output_is_prefilled_while_the_tool_speaks(tokenizer, template) -> None:
    go_on = asyncio.Event()
    lines = [f"line {n} of a long report\n" for n in range(12)]

    @tool
    async def report() -> Any:
        """Reports."""
        for line in lines[:-1]:
            yield line
        await go_on.wait()
        yield lines[-1]

    async with scripted(tokenizer, template, [call_text("report"), "ok"]) as engine:
        prefilled: list[int] = []  # tokens
        prefill = engine.prefill

        async def noted(ids: Sequence[int]) -> None:
            await prefill(ids)
            prefilled.append(len(ids))

        engine.prefill = noted
        session = engine.session(tools=[report], options=PLENTY)
        task = asyncio.create_task(session.run("go"))
        so_far = "".join(lines[:-1])
        # a request that asks for no token has read nearly all that was said
        await until(lambda: prefilled and prefilled[-1] >= len(so_far))
        before = engine.stats().computed_tokens
        go_on.set()
        reply = await task
        assert engine.stats().finished == 2
        (result,) = reply.steps[0].results
        assert result.content == "".join(lines)
        cached = reply.steps[1].completion.usage.cached_tokens["device"]
        prompt = reply.steps[1].completion.usage.prompt_tokens
        assert prompt - cached < len(lines[-1]) + LEAST_TOKENS + 40
        assert engine.stats().computed_tokens - before < len(so_far) / 2
        assert session._log.rewrites == 0
        assert await engine.leased_blocks() == 0


async def test_guards_keep_output_from_being_prefilled(tokenizer, template) -> None:
    @tool
    async def report() -> Any:
        """Reports."""
        for n in range(5):
            yield f"line {n} of a long report\n"
            await asyncio.sleep(0.002)

    async def look(_: Any) -> Pass:
        return Pass()

    async with scripted(tokenizer, template, [call_text("report"), "ok"]) as engine:
        session = engine.session(tools=[report], options=PLENTY, input_guards=[look])
        await session.run("go")
        assert engine.stats().finished == 2


async def test_a_streaming_tool_that_fails_or_is_late(tokenizer, template) -> None:
    @tool(timeout_s=0.02)
    async def late() -> Any:
        """Is late."""
        yield "one"
        await asyncio.Event().wait()

    @tool
    async def fail() -> Any:
        """Fails."""
        yield {"a": 1}
        raise KeyError("lost")

    @tool
    async def parts() -> Any:
        """Gives parts."""
        yield "x"
        yield 2
        yield {"a": 1}

    texts = ["\n".join(map(call_text, ("late", "fail", "parts"))), "ok"]
    async with scripted(tokenizer, template, texts) as engine:
        reply = await engine.session(tools=[late, fail, parts], options=PLENTY).run("go")
        assert [result.content for result in reply.steps[0].results] == [
            "Error: late was given up after its limit of 0.02 s",
            "Error: KeyError: 'lost'",
            'x2{"a":1}',
        ]


async def test_cancelling_while_a_tool_speaks_leaks_nothing(tokenizer, template) -> None:
    spoke, closed = asyncio.Event(), asyncio.Event()

    @tool
    async def report() -> Any:
        """Reports."""
        try:
            yield "words " * 50
            spoke.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with scripted(tokenizer, template, [call_text("report"), "ok"]) as engine:
        others = asyncio.all_tasks()
        session = engine.session(tools=[report], options=PLENTY)
        task = asyncio.create_task(session.run("go"))
        await spoke.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()
        assert session.messages == []
        assert await engine.leased_blocks() == 0
        assert asyncio.all_tasks() == others


@tool
async def slow_report() -> Any:
    """Reports."""
    for n in range(4):
        yield f"line {n} of a long report\n"
        await asyncio.sleep(0.001)


@tool(idempotent=False)
def block() -> str:
    """Runs in a thread."""
    time.sleep(0.002)
    return "done"


async def approve_later(_: ToolCall) -> bool:
    await asyncio.sleep(0.001)
    return True


async def look_later(_: Any) -> Pass:
    await asyncio.sleep(0)
    return Pass(3)


def with_all_there_is(engine: FakeEngine) -> Session:
    """A session with guards, approval, tools that stream, that wait and that hurry."""
    calls = "\n".join(map(call_text, ("slow_report", "block", "slow_report")))
    engine.runner.script = Script(engine.tokenizer, [f"So: {calls}", "ok", "again"])
    return engine.session(
        tools=[slow_report, block], options=PLENTY, approve=approve_later,
        output_guards=[look_later],
    )  # fmt: skip


async def nothing_is_left(engine: FakeEngine, others: set[Any]) -> None:
    assert await engine.leased_blocks() == 0
    assert asyncio.all_tasks() == others
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("num_waits", [*range(0, 12, 3), 15, 20, 30, 45, 70, 100])
async def test_cancelling_anywhere_leaks_nothing(tokenizer, template, num_waits) -> None:
    async with scripted(tokenizer, template, []) as engine:
        others = asyncio.all_tasks()
        session = with_all_there_is(engine)
        task = asyncio.create_task(session.run("go"))
        for _ in range(num_waits):
            await asyncio.sleep(0.0005)
        task.cancel()
        try:
            reply = await task
        except asyncio.CancelledError:
            assert session.messages == []
            assert session.token_ids == ()
        else:  # it was over
            assert reply.text == "ok"
        await nothing_is_left(engine, others)


@types.coroutine
def cancelled_at(work: Coroutine[Any, Any, Any], num_awaits: int) -> Generator[Any, Any, Any]:
    """Awaits `work`, and cancels the running task when it comes to this of its suspensions."""
    resume, value, count = work.send, None, 0
    while True:
        try:
            future = resume(value)
        except StopIteration as stop:
            return stop.value
        if count == num_awaits:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        count += 1
        try:
            resume, value = work.send, (yield future)
        except BaseException as exc:
            resume, value = work.throw, exc


async def test_cancelling_at_every_await_leaks_nothing(tokenizer, template) -> None:
    async with scripted(tokenizer, template, []) as engine:
        others = asyncio.all_tasks()
        for num_awaits in itertools.count():
            session = with_all_there_is(engine)
            work = cancelled_at(session.run("go"), num_awaits)
            try:
                reply = await asyncio.create_task(waited_for(work))
            except asyncio.CancelledError:
                assert session.messages == []
                assert session.token_ids == ()
            else:
                assert reply.text == "ok"
                break
            finally:
                await nothing_is_left(engine, others)
        assert num_awaits > 15
        for num_awaits in itertools.count():
            engine.runner.script = Script(engine.tokenizer, ["words"])
            work = cancelled_at(engine.prefill(range(200)), num_awaits)
            try:
                await asyncio.create_task(waited_for(work))
            except asyncio.CancelledError:
                await nothing_is_left(engine, others)
            else:
                break
        assert num_awaits > 0


async def waited_for(work: Any) -> Any:
    return await work


# ---- output and families in a session


async def test_an_output_is_a_value_of_a_turn_or_a_session(tokenizer, template) -> None:
    texts = [call_text("add", '{"a": 1, "b": 2}'), "yes", "no", "[1, 2]", '{"a": 1', "yes"]
    async with scripted(tokenizer, template, texts) as engine:
        answer = Literal["yes", "no"]
        session = engine.session(tools=[add], options=PLENTY, output=answer)
        reply = await session.run("go")
        assert (reply.text, reply.value, len(reply.steps)) == ("yes", "yes", 2)
        assert (await session.run("on")).value == "no"
        plain = engine.session(options=PLENTY)
        events = [event async for event in plain.stream("x", output=list[int])]
        assert events[-1] == TurnFinished("[1, 2]", "stop", 1, value=[1, 2])
        messages = list(plain.messages)
        plain.rules = evolve(plain.rules, options=GenerateOptions(max_tokens=7))
        with pytest.raises(OutputInvalid, match="max_tokens"):
            await plain.run("x", output={"type": "object", "properties": {"a": {}}})
        assert plain.messages == messages
        with pytest.raises(RequestInvalid, match="exclude"):
            engine.session(options=GenerateOptions(grammar="start: /a/"), output=answer)
        with pytest.raises(RequestInvalid, match="JSON form"):
            await plain.run("x", output=object())
        with pytest.raises(RequestInvalid, match="cannot be compiled"):
            await plain.run("x", output={"type": "colour"})
        done = await engine.generate("x", GenerateOptions(max_tokens=9), output=answer)
        assert (done.text, done.value) == ("yes", "yes")
        with pytest.raises(RequestInvalid, match="exclude"):
            await engine.generate("x", GenerateOptions(grammar="start: /a/"), output=answer)


def test_the_config_names_every_family() -> None:
    assert tuple(FORMATS) == TOOL_FORMATS
    assert EngineConfig(tool_format="mistral").tool_format == "mistral"
    with pytest.raises(ConfigError, match="tool_format"):
        EngineConfig(tool_format="llama")


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("is_native", [False, True])
async def test_every_family_calls_tools_in_its_own_form(tokenizer, form, is_native) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.id }}]{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    marks = {
        "hermes": "<tool_call>", "llama-json": "<|python_tag|>", "llama-pythonic": "[func_name",
        "mistral": "[TOOL_CALLS]", "mistral-named": "[TOOL_CALLS][ARGS]",
    }  # fmt: skip
    if is_native:
        head = "{% if tools %}{{ tools | tojson }}{# MARK #}{% endif %}"
        source = head.replace("MARK", marks[form.name]) + source
    calls = [ToolCall("", "add", {"a": 1, "b": 2}), ToolCall("", "add", {"a": 3, "b": 4})]
    template = ChatTemplate(source)
    async with scripted(tokenizer, template, [f"So: {form.render(calls)}", "ok"]) as engine:
        engine.chat.tool_format = "auto" if is_native else form.name
        assert engine.chat.call_format is form
        assert engine.chat.takes_tools == is_native
        session = engine.session(tools=[add], options=PLENTY)
        events = [event async for event in session.stream("go")]
        assert [e.content for e in events if isinstance(e, ToolResult)] == ["3", "7"]
        assert any(isinstance(event, ToolCallDelta) for event in events)
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert text == "So: ok"
        rewrites = 0 if form.keeps_text else 1
        assert session._log.rewrites == rewrites
        said = tokenizer.decode(session.token_ids)
        assert ("Examples of the form" in said) != is_native
