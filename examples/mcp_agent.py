"""An agent whose tools are its own and those of an MCP server, which it starts.

pip install "agentrt[mcp]"
python examples/mcp_agent.py
"""

import asyncio
import sys
from pathlib import Path
from typing import Literal

from mcp import StdioServerParameters

from agentrt import Engine, GenerateOptions, tool
from agentrt.adapters.mcp import McpClient, Progress

SERVER = StdioServerParameters(
    command=sys.executable, args=[str(Path(__file__).with_name("mcp_server.py"))]
)


@tool
async def get_opening_hours(day: Literal["Monday", "Sunday"]) -> str:
    """Get the library's opening hours on a day of the week."""
    return f"The library is open from 9 to 17 on {day}."


async def show(progress: Progress) -> None:
    print(f"  [{progress.progress:.0f} of {progress.total:.0f}] {progress.message}")


async def main() -> None:
    async with (
        Engine("smollm2-135m") as engine,
        McpClient(SERVER, on_progress=show) as library,
        engine.session(
            tools=[get_opening_hours, library],
            tool_choice="once",
            options=GenerateOptions(max_tokens=48),
        ) as session,
    ):
        for question in (
            "Please find the book Emma. Who wrote it?",
            "Please get the library's opening hours on Sunday.",
        ):
            print(question)
            reply = await session.run(question)
            for result in reply.steps[0].results:
                print(f"  {result.call.name}: {result.content}")
            print(f"  {reply.text}")


asyncio.run(main())
