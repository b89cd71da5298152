"""MCP servers as tools: a real process on stdio, and streamable HTTP on the loopback."""

import asyncio
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from fakes import until
from scripted import call_text, scripted

from agentrt import Engine, GenerateOptions, tool
from agentrt.errors import ToolInvalid
from agentrt.tools import ToolSet, run_tool
from agentrt.types import ToolCall

mcp = pytest.importorskip("mcp")
from agentrt.adapters.mcp import McpClient  # noqa: E402

HERE = Path(__file__).parent
DESK = mcp.StdioServerParameters(command=sys.executable, args=[str(HERE / "mcp_desk.py")])
# The library's own: a process transport that is collected after its event loop has gone.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def library_may_block(blockbuster):
    """MCP's library reads its packages' metadata at the first call, on our stack."""
    blockbuster.deactivate()
    yield
    blockbuster.activate()


@tool
def double(a: int) -> int:
    """Double a number."""
    return 2 * a


async def called(client, name, **arguments):
    tools = ToolSet([client])
    return await run_tool(tools, ToolCall("c", name, arguments), clock=lambda: 0.0)


async def test_a_server_process_gives_its_tools(tmp_path):
    async with McpClient(DESK) as desk:
        by_name = {each.name: each for each in desk.tools}
        assert set(by_name) == {"add", "seats_book", "refuse", "count", "wait", "draw"}
        assert by_name["add"].description == "Add two numbers."
        assert by_name["add"].parameters["properties"]["a"]["type"] == "integer"
        assert (by_name["add"].idempotent, by_name["wait"].idempotent) == (True, False)
        # a reference to a class's schema is written out: the tool's becomes part of a larger one
        seat = by_name["seats_book"].parameters["properties"]["seats"]["items"]
        assert seat["properties"]["row"]["type"] == "integer"

        assert (await called(desk, "add", a=2, b=3)).content == "5"
        assert by_name["add"].parameters["additionalProperties"] is False
        booked = await called(desk, "seats_book", seats=[{"row": 7, "letter": "A"}])
        assert (booked.content, booked.is_error) == ("7A", False)
        failed = await called(desk, "refuse", why="closed")
        assert failed.is_error
        assert "no: closed" in failed.content
        wrong = await called(desk, "add", a="two", b=3)
        assert (wrong.is_error, "arguments.a" in wrong.content) == (True, True)
        drawn = await called(desk, "draw")
        assert drawn.content == "a dot\n[image/png, which this model cannot read]"
    with pytest.raises(ToolInvalid, match="keep it open"):
        await desk.refresh()


async def test_progress_comes_while_the_tool_runs():
    told = []

    async def note(progress):
        told.append((progress.tool, progress.progress, progress.total, progress.message))

    async with McpClient(DESK, on_progress=note) as desk:
        assert (await called(desk, "count", to=3)).content == "done"
        await until(lambda: len(told) == 3)
    assert told == [("count", n, 3, f"at {n}") for n in (1, 2, 3)]


@pytest.mark.parametrize("how", ["cancelled", "given up"])
async def test_a_call_that_nobody_waits_for_is_cancelled_at_the_server(how, tmp_path):
    timeout_s = 0.3 if how == "given up" else None
    async with McpClient(DESK, timeout_s=timeout_s) as desk:
        running = asyncio.create_task(called(desk, "wait", folder=str(tmp_path)))
        if how == "cancelled":
            await until((tmp_path / "began").exists)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        else:
            assert "given up after its limit" in (await running).content
        await until((tmp_path / "cancelled").exists)
        assert (await called(desk, "add", a=1, b=1)).content == "2"  # the connection lives


async def test_its_tools_join_a_sessions_own(tokenizer, template):
    texts = [
        call_text("add", '{"a": 2, "b": 3}') + "\n" + call_text("double", '{"a": 5}'),
        call_text("desk_seats_book", '{"seats": [{"row": 1, "letter": "C"}]}'),
        "All done.",
    ]
    engine = scripted(tokenizer, template, texts, num_blocks=4000, context=9000)
    async with (
        engine,
        McpClient(DESK, only={"add"}) as adding,
        McpClient(DESK, only=["seats.book"], prefix="desk_") as desk,
    ):
        options = GenerateOptions(max_tokens=400)
        async with engine.session(tools=[double, adding, desk], options=options) as session:
            assert session.tools.names == ("double", "add", "desk_seats_book")
            reply = await session.run("go")
    assert reply.text == "All done."
    results = [[each.content for each in step.results] for step in reply.steps]
    assert results == [["5", "10"], ["1C"], []]


async def test_a_client_of_ones_own_stays_open():
    async with mcp.Client(DESK) as own:
        async with McpClient(own, only={"add"}) as desk:
            assert (await called(desk, "add", a=1, b=2)).content == "3"
        assert (await own.call_tool("add", {"a": 2, "b": 2})).content[0].text == "4"


async def test_streamable_http():
    uvicorn = pytest.importorskip("uvicorn")
    desk_server = runpy.run_path(str(HERE / "mcp_desk.py"))["server"]
    config = uvicorn.Config(
        desk_server.streamable_http_app(), host="127.0.0.1", port=0, log_level="error"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with McpClient(f"http://127.0.0.1:{port}/mcp") as desk:
            assert (await called(desk, "add", a=20, b=22)).content == "42"
            failed = await called(desk, "refuse", why="closed")
            assert failed.is_error
    finally:
        server.should_exit = True
        await serving


async def test_what_is_wrong_is_said_before_a_turn():
    with pytest.raises(ToolInvalid, match="enter the McpClient first"):
        ToolSet([McpClient(DESK)])
    with pytest.raises(ToolInvalid, match=r"no tool fly; it has add"):
        async with McpClient(DESK, only={"fly"}):
            pass
    async with McpClient(DESK) as desk:
        with pytest.raises(ToolInvalid, match="unique names, repeated: add"):
            ToolSet([desk, McpClient.tools.fget(desk)[0]])


def test_the_example_asks_a_server_that_it_starts(capsys):
    """With the real model: it calls the server's tool and its own, and answers from the results."""
    runpy.run_path(str(HERE.parent / "examples" / "mcp_agent.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "find_book: Emma is by Jane Austen, 1815." in said
    assert "[1 of 1] looked up Emma" in said
    assert "get_opening_hours: The library is open from 9 to 17 on Sunday." in said


# ---- the official examples, of the library's source distribution, which .ci/adapters fetches

EXAMPLES = os.environ.get("MCP_EXAMPLES")
official = pytest.mark.skipif(EXAMPLES is None, reason="MCP_EXAMPLES names no folder of them")


def story(name):
    return mcp.StdioServerParameters(
        command=sys.executable, args=["-m", f"stories.{name}.server"], cwd=EXAMPLES
    )


async def turns(server, only, *questions):
    """SmolLM2 with the server's tools: a call a question, what came of it, and the answer."""
    async with (
        Engine() as engine,
        McpClient(server, only=only) as client,
        engine.session(
            tools=[client], tool_choice="once", options=GenerateOptions(max_tokens=64)
        ) as session,
    ):
        for question in questions:
            reply = await session.run(question)
            (result,) = reply.steps[0].results
            yield result.call.name, dict(result.call.arguments), result.content, reply.text


@official
async def test_an_official_example_keeps_notes_for_the_real_model():
    """The id is the server's: it removes a note, so the second call had the right one."""
    added, removed = [
        turn
        async for turn in turns(
            story("stickynotes"),
            {"add_note", "remove_note"},
            "Please add a sticky note that says: buy milk.",
            "Please remove the note that you added.",
        )
    ]
    assert added[:2] == ("add_note", {"text": "Buy milk"})
    note = json.loads(added[2])
    assert note["uri"] == f"note:///{note['id']}"
    assert removed[:3] == ("remove_note", {"note_id": note["id"]}, "true")


@official
async def test_an_official_example_calculates_for_the_real_model():
    [(name, arguments, result, said)] = [
        turn async for turn in turns(story("tools"), None, "Use the calculator to add 40 and 2.")
    ]
    assert (name, arguments) == ("calc", {"op": "add", "a": 40, "b": 2})
    assert json.loads(result) == {"op": "add", "result": 42}
    assert "42" in said


@official
async def test_an_official_example_tells_its_progress():
    told = []

    async def note(progress):
        told.append((progress.progress, progress.total, progress.message))

    async with McpClient(story("streaming"), on_progress=note) as client:
        done = await called(client, "countdown", steps=3)
        await until(lambda: len(told) == 3)
    assert json.loads(done.content) == {"completed": 3, "total": 3}
    assert told == [(n, 3, f"step {n}/3") for n in (1, 2, 3)]
