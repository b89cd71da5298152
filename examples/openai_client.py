"""An agent written against the client of `openai`, with its engine in the same process.

`pip install "agentrt[openai]"`. The one line that is ours is `client = engine.openai()`.
"""

import asyncio
import json
from typing import Any

from agentrt import Engine

MODEL = "smollm2-135m"
FLIGHTS = {
    "ZX12AB": "flies from Denver to Miami on May 20",
    "4BMN53": "flies from Boston to Rome on June 3",
}
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "get_reservation",
        "description": "Look up a reservation by its id.",
        "parameters": {
            "type": "object",
            "properties": {"reservation_id": {"type": "string", "maxLength": 12}},
            "required": ["reservation_id"],
            "additionalProperties": False,
        },
    },
}


async def turn(client: Any, messages: list[Any], question: str) -> None:
    """One question: a call, its result, and the answer as it comes."""
    messages.append({"role": "user", "content": question})
    settings: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "max_completion_tokens": 64,
        "tools": [LOOK_UP],
        "prompt_cache_key": "a customer",  # names the conversation: its KV waits for the tool
    }
    made = await client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **settings
    )
    message = made.choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        wanted = json.loads(call.function.arguments)["reservation_id"]
        found = f"Reservation {wanted} {FLIGHTS.get(wanted, 'does not exist')}."
        print(f"[call] {call.function.name}({wanted}) -> {found}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": found})
    stream = await client.chat.completions.create(
        messages=messages,
        tool_choice="none",
        stream=True,
        stream_options={"include_usage": True},
        **settings,
    )
    text = ""
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        else:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
            print(f"{text}\n({cached} of {chunk.usage.prompt_tokens} prompt tokens were cached)")
    messages.append({"role": "assistant", "content": text})


async def main() -> None:
    async with Engine(MODEL) as engine, engine.openai() as client:
        messages: list[Any] = []
        for name in FLIGHTS:
            question = f"Please look up reservation {name}. When does it fly?"
            await turn(client, messages, question)


asyncio.run(main())
