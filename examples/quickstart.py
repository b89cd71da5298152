import asyncio

from agentrt import Engine, GenerateOptions, tool


@tool
async def get_reservation(reservation_id: str) -> str:
    """Look up a reservation by its id."""
    return f"Reservation {reservation_id} flies from Denver to Miami on May 20."


async def main() -> None:
    options = GenerateOptions(max_tokens=48)
    async with (
        Engine("smollm2-135m") as engine,
        engine.session(tools=[get_reservation], tool_choice="once", options=options) as session,
    ):
        reply = await session.run("Please look up reservation ZX12AB. When does it fly?")
        print(reply.steps[0].results[0].call.arguments, "->", reply.text)


asyncio.run(main())
