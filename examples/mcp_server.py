"""A server of the Model Context Protocol, on its standard input and output: a small library.

`python examples/mcp_agent.py` starts it. Any other MCP client can, too.
"""

from typing import Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.types import ToolAnnotations

BOOKS = {"Emma": "Jane Austen, 1815", "Ulysses": "James Joyce, 1922"}
server = MCPServer("library")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
async def find_book(title: Literal["Emma", "Ulysses"], context: Context) -> str:
    """Find out who wrote a book, and when."""
    await context.report_progress(1, 1, f"looked up {title}")
    return f"{title} is by {BOOKS[title]}."


if __name__ == "__main__":
    server.run("stdio")
