"""How much agentrt disturbs the event loop that it lives in, with 32 streams running.

    python benchmarks/event_loop.py [--streams 32] [--tokens 48]

A task sleeps 1 ms at a time and notes how late it wakes, first alone, then beside the streams. The
share of step time outside the model (scheduling, cache, text, events) is `Stats.overhead`.
"""

import argparse
import asyncio
import time

from agentrt import Engine, EngineConfig, GenerateOptions

SLEEP_S = 0.001


async def measure_lag(stop: asyncio.Event) -> list[float]:
    """Seconds that each wake-up came late."""
    lags = []
    while not stop.is_set():
        due = time.perf_counter() + SLEEP_S
        await asyncio.sleep(SLEEP_S)
        lags.append(time.perf_counter() - due)
    return sorted(lags)


async def consume(engine: Engine, prompt: list[int], num_tokens: int) -> int:
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    return sum([1 async for _ in engine.stream(prompt, options)])


async def run(num_streams: int, num_tokens: int) -> None:
    async with Engine(config=EngineConfig(disk_kv_bytes=0, speculation=False)) as engine:
        await consume(engine, [1, 2, 3], 2)
        for name, streams in (("idle", 0), (f"{num_streams} streams", num_streams)):
            stop = asyncio.Event()
            lag = asyncio.create_task(measure_lag(stop))
            before = engine.stats()
            prompts = [[1 + i, *range(100, 300)] for i in range(streams)]
            await asyncio.gather(*(consume(engine, prompt, num_tokens) for prompt in prompts))
            await asyncio.sleep(0.5 if not streams else 0)
            stop.set()
            lags, after = await lag, engine.stats()
            p50, p99 = lags[len(lags) // 2], lags[int(0.99 * len(lags))]
            line = f"{name:12} lag p50 {1e3 * p50:6.2f} ms, p99 {1e3 * p99:6.2f} ms"
            if streams:
                step_s = after.step_s - before.step_s
                outside = 1 - (after.forward_s - before.forward_s) / step_s
                line += f", outside the model {100 * outside:.1f} % of {step_s:.1f} s in steps"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.streams, arguments.tokens))


if __name__ == "__main__":
    main()
