"""What the client of `openai` adds: from the engine's first token to its first event.

    python benchmarks/openai_client.py [--requests 100] [--load 4]

A request's first token is known when its step is collected; its first event is there when the
client's stream gives a chunk; of Responses that is its first delta of text, as the events before
it come without a token. It is measured alone and beside other streams of the same client, and of
`Engine.stream` too.
"""

import argparse
import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.observer import Observer

MODEL = "smollm2-135m"


class FirstTokens(Observer):
    """When the newest step that gave a token to a watched request was collected."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens  # of watched requests: others ask for another number
        self._seen: set[str] = set()
        self.at_s = 0.0

    def collected(self, plan: Any, now: float) -> None:
        for work in plan.work:
            request = work.request
            is_watched = request.options.max_tokens == self._num_tokens
            has_token = request.num_output_tokens > 0
            if has_token and is_watched and request.id not in self._seen:
                self._seen.add(request.id)
                self.at_s = now


def question(number: int) -> str:
    return f"What is the capital of country number {number}? Say its name, and where it lies."


async def chat(client: Any, text: str, num_tokens: int) -> float:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        stream=True,
        temperature=0,
        max_completion_tokens=num_tokens,
    )
    await anext(stream)
    at_s = time.monotonic()
    async for _ in stream:
        pass
    return at_s


async def respond(client: Any, text: str, num_tokens: int) -> float:
    stream = await client.responses.create(
        model=MODEL,
        input=text,
        stream=True,
        temperature=0,
        max_output_tokens=num_tokens,
        store=False,
    )
    while (await anext(stream)).type != "response.output_text.delta":
        pass
    at_s = time.monotonic()
    async for _ in stream:
        pass
    return at_s


async def direct(engine: Engine, text: str, num_tokens: int) -> float:
    events = engine.stream(text, GenerateOptions(max_tokens=num_tokens))
    await anext(events)
    at_s = time.monotonic()
    async for _ in events:
        pass
    return at_s


async def others(client: Any, load: int) -> None:
    async def forever(number: int) -> None:
        while True:
            await chat(client, f"Tell story number {number}.", 200)

    await asyncio.gather(*map(forever, range(load)))


async def measure(engine: Engine, name: str, ask: Callable[[str, int], Any], num: int) -> None:
    num_tokens = 12
    first, late_s = FirstTokens(num_tokens), []
    with engine._open.loop.observers.attached(first):
        for number in range(num):
            at_s = await ask(question(number), num_tokens)
            late_s.append(at_s - first.at_s)
    late_s.sort()
    p50, p99 = (1e3 * late_s[math.ceil(share * len(late_s)) - 1] for share in (0.5, 0.99))
    shown = f"p50 {p50:5.2f} ms, p99 {p99:5.2f} ms, worst {1e3 * late_s[-1]:5.2f} ms"
    print(f"{name:28} first event after first token: {shown}", flush=True)


async def run(num_requests: int, load: int) -> None:
    config = EngineConfig(disk_kv_bytes=0, speculation=False)
    async with Engine(MODEL, config) as engine, engine.openai() as client:
        ways = {
            "Engine.stream": lambda text, num: direct(engine, text, num),
            "chat.completions": lambda text, num: chat(client, text, num),
            "responses": lambda text, num: respond(client, text, num),
        }
        for ask in ways.values():
            await ask("warm", 2)
        for num_others in (0, load):
            beside = asyncio.create_task(others(client, num_others))
            for name, ask in ways.items():
                await measure(engine, f"{name}, {num_others} others", ask, num_requests)
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--load", type=int, default=4)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.requests, arguments.load))


if __name__ == "__main__":
    main()
