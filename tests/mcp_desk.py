"""A real MCP server for tests, on stdio or streamable HTTP."""

import sys

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.utilities.types import Image
from mcp.types import ToolAnnotations
from pydantic import BaseModel

server = MCPServer("desk")


class Seat(BaseModel):
    row: int
    letter: str


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="seats.book")
async def book(seats: list[Seat]) -> str:
    """Book seats."""
    return ", ".join(f"{seat.row}{seat.letter}" for seat in seats)


@server.tool()
async def refuse(why: str) -> str:
    """Always fails."""
    raise ToolError(f"no: {why}")


@server.tool()
async def count(to: int, context: Context) -> str:
    """Counts, and tells of it."""
    for number in range(1, to + 1):
        await context.report_progress(number, to, f"at {number}")
    return "done"


@server.tool()
async def wait(folder: str) -> str:
    """Waits for ever; its folder says when it began, and when it was cancelled."""
    await anyio.Path(folder, "began").touch()
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.Path(folder, "cancelled").touch()
    return "never"


@server.tool()
async def draw() -> list:
    """A picture and a word."""
    return ["a dot", Image(data=b"\x89PNG", format="png")]


if __name__ == "__main__":
    server.run(sys.argv[1] if len(sys.argv) > 1 else "stdio")
