from __future__ import annotations

import asyncio
import dataclasses
import datetime
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from typing import Any

import attrs
import pytest

from agentrt.errors import ToolInvalid
from agentrt.tools import Tool, ToolSet, as_tool, result_text, run_tool, tool
from agentrt.types import ToolCall, ToolResult


@tool
def double(number: int) -> int:
    """Doubles a number."""
    return 2 * number


@tool(name="wait-for", description="Waits.", timeout_s=0.05, idempotent=True)
async def wait(seconds: float) -> str:
    """Not shown."""
    await asyncio.sleep(seconds)
    return f"{threading.current_thread() is threading.main_thread()}"


class Desk:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @tool(idempotent=True)
    async def file(self, text: str) -> int:
        """Files a text."""
        self.seen.append(text)
        return len(self.seen)

    def stamp(self, text: str) -> str:
        """Stamps a text."""
        self.seen.append(text)
        return text.upper()


async def run(
    function: Tool | Callable[..., Any], name: str | None = None, **arguments: Any
) -> ToolResult:
    tools = ToolSet([function])
    return await run_tool(
        tools, ToolCall("call_0", name or tools.names[0], arguments), clock=time.monotonic
    )


def test_the_decorator_reads_the_function_and_its_options() -> None:
    assert (double.name, double.description) == ("double", "Doubles a number.")
    assert (double.timeout_s, double.is_async, double.idempotent) == (None, False, None)
    assert (wait.name, wait.description) == ("wait-for", "Waits.")
    assert (wait.timeout_s, wait.is_async, wait.idempotent) == (0.05, True, True)
    assert double.schema() == {
        "type": "function",
        "function": {
            "name": "double",
            "description": "Doubles a number.",
            "parameters": {
                "type": "object",
                "properties": {"number": {"type": "integer"}},
                "required": ["number"],
                "additionalProperties": False,
            },
        },
    }


async def test_a_decorated_function_is_still_called_directly() -> None:
    assert double(4) == 8
    assert await wait(seconds=0) == "True"


async def test_methods_are_tools_of_their_object() -> None:
    desk = Desk()
    assert (await run(desk.file, text="a")).content == "1"
    assert (await run(desk.stamp, text="b")).content == "B"
    assert desk.seen == ["a", "b"]
    with pytest.raises(ToolInvalid, match=r"pass instance\.file"):
        ToolSet([Desk.file])
    with pytest.raises(ToolInvalid, match=r"pass instance\.stamp"):
        as_tool(Desk.stamp)


@pytest.mark.parametrize("candidate", [3, Desk, "double"])
def test_only_functions_can_be_tools(candidate: Any) -> None:
    with pytest.raises(ToolInvalid, match="function"):
        as_tool(candidate)


@pytest.mark.parametrize("options", [{"name": "two words"}, {"timeout_s": 0.0}, {"name": "a" * 65}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ToolInvalid):
        tool(**options)(double.function)


def test_a_tool_set_keeps_order_and_unique_names() -> None:
    tools = ToolSet([double, wait])
    assert tools.names == ("double", "wait-for")
    assert [schema["function"]["name"] for schema in tools.schemas()] == list(tools.names)
    assert tools.get("double") is double
    assert tools.get("triple") is None
    assert (len(tools), list(tools)) == (2, [double, wait])
    with pytest.raises(ToolInvalid, match="double"):
        ToolSet([double, double])


async def test_sync_tools_run_in_a_worker_thread_and_async_ones_in_the_loop() -> None:
    def where() -> bool:
        return threading.current_thread() is threading.main_thread()

    async def where_async() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert (await run(where)).content == "false"
    assert (await run(where_async)).content == "true"


async def test_a_coroutine_from_a_sync_function_is_awaited() -> None:
    def lazily(seconds: float) -> Any:
        return wait.function(seconds)

    assert (await run(lazily, seconds=0)).content == "True"


async def test_an_object_with_an_async_call_is_a_tool() -> None:
    class Adder:
        async def __call__(self, number: int) -> int:
            """Adds one."""
            return number + 1

    made = tool(name="add")(Adder())
    assert (made.description, made.is_async) == ("Adds one.", True)
    assert (await run(made, number=1)).content == "2"


async def test_the_clock_times_the_call() -> None:
    ticks = iter([10.0, 12.5])
    call = ToolCall("call_0", "double", {"number": 1})
    result = await run_tool(ToolSet([double]), call, clock=lambda: next(ticks))
    assert result == ToolResult(call, "2", False, 2.5)


async def test_an_exception_becomes_an_error_result() -> None:
    def fail(text: str) -> None:
        raise ValueError(text)

    assert (await run(fail, text="no seat")).content == "Error: ValueError: no seat"
    assert (await run(fail, text="")).content == "Error: ValueError"
    assert (await run(fail, text="\ud800")).content == "Error: ValueError: ?"


async def test_wrong_arguments_and_names_become_error_results() -> None:
    result = await run(double, number="four")
    assert (result.content, result.is_error) == (
        "Error: arguments.number: expected integer, got 'four'",
        True,
    )
    result = await run(double, name="triple", number=4)
    assert (result.content, result.is_error) == (
        "Error: no tool is named 'triple'; known tools: double",
        True,
    )


async def test_a_timeout_becomes_an_error_result() -> None:
    released = threading.Event()

    @tool(timeout_s=0.05)
    def block() -> bool:
        """Blocks."""
        return released.wait(10)

    expected = " was given up after its limit of 0.05 s"
    result = await run(wait, seconds=10)
    assert (result.content, result.is_error) == (f"Error: wait-for{expected}", True)
    result = await run(block)
    released.set()
    assert (result.content, result.is_error) == (f"Error: block{expected}", True)


async def test_a_tool_may_raise_timeout_error_itself() -> None:
    async def late() -> None:
        raise TimeoutError("upstream")

    assert (await run(late)).content == "Error: TimeoutError: upstream"


@pytest.mark.parametrize("is_async", [True, False])
async def test_cancellation_propagates(is_async: bool) -> None:
    loop, started, released = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def block() -> bool:
        loop.call_soon_threadsafe(started.set)
        return released.wait(10)

    async def sleep() -> None:
        started.set()
        await asyncio.sleep(10)

    task = asyncio.create_task(run(sleep if is_async else block))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    released.set()


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int


@attrs.frozen
class Line:
    ends: tuple[Point, ...]


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


def cycle() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        ({"a": [1, 2.5, True]}, '{"a":[1,2.5,true]}'),
        ({"città": "é"}, '{"città":"é"}'),
        (Line((Point(1), Point(2))), '{"ends":[{"x":1},{"x":2}]}'),
        ({"b", "a"}, '["a","b"]'),
        ({Colour.RED}, '["red"]'),
        (datetime.date(2024, 5, 1), '"2024-05-01"'),
        (datetime.datetime(2024, 5, 1, 12), '"2024-05-01T12:00:00"'),
        (Decimal("1.10"), '"1.10"'),
        ([Opaque()], '["<opaque>"]'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (cycle(), "[[...]]"),
    ],
)
def test_result_text(value: Any, text: str) -> None:
    assert result_text(value) == text
