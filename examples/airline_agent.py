"""Four agents serve four customers of a small airline at once, in one engine.

The customers' messages are scripted, plain, and chosen among others so that the small model's calls
come out right: with other words it copies ids wrongly at times. All that the agents say
and call is SmolLM2-135M-Instruct's, decoded greedily: a turn is one call, held to the tools'
schemas, and one answer. Which tool it calls and with what is its choice, right or wrong. The tools
change a SQLite database; what became of it is printed at the end.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from airline_database import AirlineDatabase

from agentrt import Engine, GenerateOptions, TextDelta, ToolCallArguments, ToolResult, TurnFinished

SYSTEM = (
    "You are a customer service agent of an airline. "
    "Tell the customer in one short sentence what the tool says."
)
CUSTOMERS = {
    "Omar": [
        "Hello! Could you look up reservation JG7FMM for me?",
        "I need to save some money. Please change the cabin of JG7FMM to economy.",
    ],
    "Sofia": [
        "Hi, please look up reservation 4BMN53.",
        "Please add a bag: set the bags of reservation 4BMN53 to 2.",
    ],
    "Mia": [
        "Hello, please look up reservation H9ZU1C.",
        "My plans have changed. Please cancel reservation H9ZU1C.",  # its fare forbids that
        "Then please set the bags of reservation H9ZU1C to 1.",
        "Please look up the user of H9ZU1C. Am I a silver member?",
    ],
    "Aarav": [
        "Good morning. Please look up reservation M05KNL.",
        "I cannot fly. Please cancel reservation M05KNL.",
        "Thank you. Please get reservation M05KNL once more.",
    ],
}
LINE_CHARACTERS = 80


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = AirlineDatabase(Path(folder) / "airline.db")
        before = database.reservations()
        async with Engine("smollm2-135m") as engine:
            begin_s = time.perf_counter()
            async with asyncio.TaskGroup() as agents:
                for customer, messages in CUSTOMERS.items():
                    agents.create_task(serve(engine, database, customer, messages))
            show_cost(engine, time.perf_counter() - begin_s)
        show_changes(before, database.reservations())


async def serve(
    engine: Engine, database: AirlineDatabase, customer: str, messages: list[str]
) -> None:
    """One agent's conversation with one customer."""
    options = GenerateOptions(max_tokens=64)
    async with engine.session(
        system=SYSTEM, tools=database.tools, tool_choice="once", options=options
    ) as session:
        for message in messages:
            show(customer, "asks", message)
            await show_turn(customer, session.stream(message))


async def show_turn(customer: str, events: AsyncIterator[Any]) -> None:
    """Print a turn while it goes on: by lines, since four go on at once."""
    text = ""
    async for event in events:
        match event:
            case TextDelta():
                text += event.text
                if len(text) > LINE_CHARACTERS and " " in text:
                    line, _, text = text.rpartition(" ")
                    show(customer, "hears", line)
            case ToolCallArguments(call=call):
                arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
                show(customer, "calls", f"{call.name}({arguments})")
            case ToolResult():
                show(customer, "gets", event.content)
            case TurnFinished():
                reason = event.finish_reason
                show(customer, "hears", text if reason == "stop" else f"{text} [cut: {reason}]")


def show(customer: str, kind: str, text: str) -> None:
    print(f"{customer:<5} {kind:<5} | {' '.join(text.split())}", flush=True)


def show_cost(engine: Engine, seconds: float) -> None:
    stats, turns = engine.stats(), sum(map(len, CUSTOMERS.values()))
    cached_tokens = stats.prompt_tokens - stats.computed_tokens  # in memory, or of earlier runs
    share = cached_tokens / stats.prompt_tokens
    print(f"\nturns          {turns} in {seconds:.1f} s")
    print(f"prompt tokens  {stats.prompt_tokens:,}")
    print(f"  from cache   {cached_tokens:,} ({share:.1%})")
    print(f"  computed     {stats.computed_tokens:,}")
    print(f"output tokens  {stats.output_tokens:,} ({stats.output_tokens / seconds:.1f} a second)")


def show_changes(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    print("\nchanged in the database")
    for reservation_id, row in after.items():
        for column, old in before[reservation_id].items():
            if row[column] != old:
                print(f"  {reservation_id} {column}: {old} -> {row[column]}")


if __name__ == "__main__":
    asyncio.run(main())
