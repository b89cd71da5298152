"""Tools: Python functions that a model may call."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any, Protocol, overload, runtime_checkable
from uuid import UUID

import anyio
import anyio.to_thread
import attrs
from attrs import Attribute, field, frozen

from agentrt.errors import AgentrtError, ToolInvalid
from agentrt.tool_arguments import bind
from agentrt.tool_schema import describe, is_unbound_method, name_of
from agentrt.types import ToolCall, ToolResult

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what the common chat formats agree on


def _check_name(_: object, __: Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ToolInvalid(f"a tool's name is 1 to 64 letters, digits, _ or -, got {value!r}")


def _check_timeout(tool: Tool, _: Attribute[float | None], value: float | None) -> None:
    if value is not None and not (0 < value < math.inf):
        raise ToolInvalid(f"timeout_s of tool {tool.name!r} must be above 0 or None, got {value!r}")


@frozen(kw_only=True, eq=False)
class Tool:
    """A function with the name, description and JSON schema that the model sees.

    Calling it calls the function. `timeout_s` says when a call is given up. `idempotent` says
    whether a repeated call does no harm: where it is False, a call starts only once the model's
    turn is complete, else as soon as its arguments are. An async generator's results are joined,
    and read by the model's prefill as they come (`streams`).
    """

    name: str = field(validator=_check_name)
    description: str
    parameters: Mapping[str, Any] = field(repr=False)
    function: Callable[..., Any] = field(repr=False)
    timeout_s: float | None = field(default=None, validator=_check_timeout)
    is_async: bool = False
    idempotent: bool | None = None
    streams: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Tool:
        """Binds a tool that was defined in a class body to its instance, as methods do."""
        if instance is None or not is_unbound_method(self.function):
            return self
        return attrs.evolve(self, function=self.function.__get__(instance, owner))

    def schema(self) -> dict[str, Any]:
        """The tool in the form of OpenAI's `tools` list, which chat templates take."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    idempotent: bool | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    idempotent: bool | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Makes a sync or async function, or a method, a tool: `@tool` or `@tool(timeout_s=5)`.

    Raises ToolInvalid, naming the parameter, if its signature has no JSON schema.
    """
    if function is None:
        return partial(
            _make_tool,
            name=name,
            description=description,
            timeout_s=timeout_s,
            idempotent=idempotent,
        )
    return _make_tool(
        function, name=name, description=description, timeout_s=timeout_s, idempotent=idempotent
    )


def _make_tool(
    function: Callable[..., Any],
    *,
    name: str | None,
    description: str | None,
    timeout_s: float | None,
    idempotent: bool | None,
) -> Tool:
    if not callable(function) or inspect.isclass(function):
        raise ToolInvalid(f"a tool is a function or a bound method, got {function!r}")
    documented, parameters = describe(function)
    return Tool(
        name=name or name_of(function),
        description=documented if description is None else description,
        parameters=parameters,
        function=function,
        timeout_s=timeout_s,
        is_async=_is_async(function),
        idempotent=idempotent,
        streams=_streams(function),
    )


def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _streams(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - an object with such a __call__
    return inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(call)


def as_tool(candidate: Tool | Callable[..., Any]) -> Tool:
    """A tool from a tool, a function or a bound method.

    Raises ToolInvalid if it cannot be one.
    """
    made = candidate if isinstance(candidate, Tool) else tool(candidate)
    if is_unbound_method(made.function):
        raise ToolInvalid(
            f"{made.function.__qualname__} is a method without its object; "
            f"pass instance.{made.function.__name__}"
        )
    return made


@runtime_checkable
class ToolSource(Protocol):
    """Something that has tools, as a connection to a server does."""

    @property
    def tools(self) -> tuple[Tool, ...]: ...


def _as_tools(
    candidates: Iterable[Tool | Callable[..., Any] | ToolSource],
) -> tuple[Tool, ...]:
    made: list[Tool] = []
    for candidate in candidates:
        if isinstance(candidate, ToolSource) and not callable(candidate):
            made += candidate.tools
        else:
            made.append(as_tool(candidate))
    return tuple(made)


@frozen
class ToolSet:
    """The tools of one session, by unique name."""

    tools: tuple[Tool, ...] = field(default=(), converter=_as_tools)

    def __attrs_post_init__(self) -> None:
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ToolInvalid(f"tools need unique names, repeated: {', '.join(repeated)}")

    def __iter__(self) -> Iterator[Tool]:
        return iter(self.tools)

    def __len__(self) -> int:
        return len(self.tools)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, in order."""
        return tuple(each.name for each in self.tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools in the form of OpenAI's `tools` list."""
        return [each.schema() for each in self.tools]

    def get(self, name: str) -> Tool | None:
        """The tool of that name, or None."""
        return next((each for each in self.tools if each.name == name), None)


async def run_tool(
    tools: ToolSet,
    call: ToolCall,
    *,
    clock: Callable[[], float],
    grown: Callable[[str], None] | None = None,
) -> ToolResult:
    """Runs one call, and never raises for what the model or the tool did wrong.

    `grown` is told the result so far of a tool that streams, whenever there is more.

    An unknown name, arguments that do not fit, an exception and a timeout give an error result that
    tells the model. A sync function runs in a worker thread; when the call times out or is
    cancelled, that thread is left to end by itself, since Python cannot stop it.
    """
    started_s = clock()
    text, is_error = await _outcome(tools, call, grown)
    return ToolResult(call, _encodable(text), is_error, clock() - started_s)


async def _outcome(
    tools: ToolSet, call: ToolCall, grown: Callable[[str], None] | None
) -> tuple[str, bool]:
    found = tools.get(call.name)
    if found is None:
        known = ", ".join(tools.names) or "none"
        return f"Error: no tool is named {call.name!r}; known tools: {known}", True
    try:
        arguments = bind(found.function, found.parameters, dict(call.arguments))
    except AgentrtError as error:
        return f"Error: {error}", True
    try:
        with anyio.move_on_after(found.timeout_s):
            if found.streams:
                return await _collect(found.function(**arguments), grown), False
            return result_text(await _invoke(found, arguments)), False
    except Exception as error:
        message = str(error)
        return f"Error: {type(error).__name__}{': ' if message else ''}{message}", True
    return f"Error: {found.name} was given up after its limit of {found.timeout_s:g} s", True


async def _invoke(tool: Tool, arguments: dict[str, Any]) -> Any:
    call = partial(tool.function, **arguments)
    result = (
        call() if tool.is_async else await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    )
    # a sync function may also hand back a coroutine: a lambda around an async one does
    return await result if inspect.isawaitable(result) else result


async def _collect(parts: AsyncGenerator[Any], grown: Callable[[str], None] | None) -> str:
    text = ""
    async with aclosing(parts):
        async for part in parts:
            text += result_text(part)
            if grown is not None:
                grown(_encodable(text))
    return text


def result_text(value: Any) -> str:
    """What the model reads of a tool's result: a str as it is, other values as compact JSON."""
    if isinstance(value, str) and not isinstance(value, Enum):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError):  # keys that are no str, or a cycle
        return repr(value)


def _plain(value: Any) -> Any:
    """A JSON-ready form of a value that json does not know."""
    if isinstance(value, Enum):
        return value.value
    if attrs.has(type(value)):
        return attrs.asdict(value, recurse=False)
    if dataclasses.is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda item: (type(item).__name__, repr(item)))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Decimal | UUID | PurePath):
        return str(value)
    return repr(value)


def _encodable(text: str) -> str:
    """The text with lone surrogates replaced: no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode()
