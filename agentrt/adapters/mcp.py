"""MCP: the tools of a Model Context Protocol server join a session's own.

async with McpClient(StdioServerParameters(command="server")) as files:
    async with engine.session(tools=[look_up, files]) as session: ...
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import Any, Self

from attrs import define, field, frozen

from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.schemas import closed, standalone
from agentrt.errors import AgentrtError, MissingExtra, ToolInvalid
from agentrt.tools import Tool, result_text

try:
    import mcp
    from mcp.types import (
        AudioContent,
        CallToolResult,
        EmbeddedResource,
        ImageContent,
        ResourceLink,
        TextContent,
        TextResourceContents,
    )
except ImportError as exc:
    raise MissingExtra('this needs the MCP SDK: pip install "agentrt[mcp]"') from exc

_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_-]")
_NAME_CHARACTERS = 64


class McpToolFailed(AgentrtError, RuntimeError):
    """The server says that its tool failed; the message is what the model reads."""


@frozen
class Progress:
    """How far a tool is, as its server tells it."""

    tool: str
    progress: float
    total: float | None
    message: str | None


OnProgress = Callable[[Progress], Awaitable[None]]


@define(eq=False)
class McpClient:
    """A connection to one server, and its tools as of the connection (or the last `refresh`).

    `server` is what `mcp.Client` takes (a URL for streamable HTTP, StdioServerParameters to start
    a process, a transport), or an `mcp.Client` of yours, entered or not; one that is entered stays
    open. `prefix` goes before the tools' names, `only` picks some of them by their own names.

    A call that is cancelled, or is given up after `timeout_s`, is cancelled at the server too.
    Enter and leave it in one task, as all that MCP's library opens.
    """

    server: Any
    prefix: str = field(default="", kw_only=True)
    only: Collection[str] | None = field(default=None, kw_only=True)
    timeout_s: float | None = field(default=None, kw_only=True)
    on_progress: OnProgress | None = field(default=None, kw_only=True)
    _tools: tuple[Tool, ...] | None = field(default=None, init=False)
    _client: mcp.Client | None = field(default=None, init=False)
    _stack: AsyncExitStack = field(factory=AsyncExitStack, init=False)

    async def __aenter__(self) -> Self:
        client = self.server if isinstance(self.server, mcp.Client) else mcp.Client(self.server)
        try:
            if not _is_entered(client):
                await self._stack.enter_async_context(client)
            self._client = client
            await self.refresh()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client = None
        await self._stack.aclose()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The server's tools. Raises ToolInvalid before it is entered."""
        if self._tools is None:
            raise ToolInvalid("enter the McpClient first: `async with McpClient(...) as client`")
        return self._tools

    async def refresh(self) -> None:
        """Ask the server which tools it has. Sessions that are open keep what they began with."""
        found, cursor = [], None
        while True:
            listed = await self._connected().list_tools(cursor=cursor)
            found += listed.tools
            cursor = listed.next_cursor
            if cursor is None:
                break
        known = {each.name for each in found}
        if self.only is not None and not known.issuperset(self.only):
            missing = ", ".join(sorted(set(self.only) - known))
            raise ToolInvalid(
                f"the server has no tool {missing}; it has {', '.join(sorted(known))}"
            )
        wanted = found if self.only is None else [each for each in found if each.name in self.only]
        self._tools = tuple(map(self._tool, wanted))

    def _tool(self, listed: mcp.Tool) -> Tool:
        name = _FORBIDDEN.sub("_", f"{self.prefix}{listed.name}")[:_NAME_CHARACTERS]
        try:
            parameters = standalone(closed(listed.input_schema), f"tool {listed.name}")
        except Refusal as exc:
            raise ToolInvalid(f"{exc}: leave the tool out with `only`") from exc
        return Tool(
            name=name,
            description=listed.description or listed.title or "",
            parameters=parameters,
            function=_Call(self, listed.name),
            timeout_s=self.timeout_s,
            is_async=True,
            idempotent=_is_idempotent(listed),
        )

    def _connected(self) -> mcp.Client:
        if self._client is None:
            raise ToolInvalid("the McpClient is closed: keep it open as long as its sessions")
        return self._client


@frozen
class _Call:
    """A tool's function. Its parameters are whatever the server's schema says."""

    _owner: McpClient
    _name: str

    async def __call__(self, /, **arguments):  # type: ignore[no-untyped-def]
        owner = self._owner
        result = await owner._connected().call_tool(
            self._name,
            arguments,
            progress_callback=None if owner.on_progress is None else self._tell,
        )
        text = _text(result)
        if result.is_error:
            raise McpToolFailed(text)
        return text

    async def _tell(self, progress: float, total: float | None, message: str | None) -> None:
        assert self._owner.on_progress is not None
        await self._owner.on_progress(Progress(self._name, progress, total, message))


def _is_entered(client: mcp.Client) -> bool:
    try:
        _ = client.session
    except RuntimeError:
        return False
    return True


def _is_idempotent(listed: mcp.Tool) -> bool:
    """What the server says; where it says nothing, MCP has it that a call may change things."""
    hints = listed.annotations
    return hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)


def _text(result: CallToolResult) -> str:
    """What the model reads: the text; of what is no text, that it is there."""
    if not result.content and result.structured_content is not None:
        return result_text(result.structured_content)
    return "\n".join(map(_part, result.content))


def _part(part: Any) -> str:
    if isinstance(part, TextContent):
        return part.text
    if isinstance(part, EmbeddedResource):
        resource = part.resource
        if isinstance(resource, TextResourceContents):
            return resource.text
        return f"[a resource that is no text: {resource.uri}]"
    if isinstance(part, ResourceLink):
        return f"[a resource: {part.uri}]"
    if isinstance(part, ImageContent | AudioContent):
        return f"[{part.mime_type}, which this model cannot read]"
    return f"[{part.type}, which this model cannot read]"
