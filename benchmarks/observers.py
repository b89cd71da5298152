"""What it costs to be watched: a recording, OpenTelemetry, Prometheus, beside 32 streams.

    OMP_NUM_THREADS=1 python benchmarks/observers.py [--streams 32] [--tokens 48] [--rounds 5]

Rounds without and with each observer alternate in one engine. Two figures, both of processor time,
which other programs do not change: the share of a round's that its callbacks take, which is that of
the step time on one thread; and the whole round's against one without it, where the threads that
write and export count too. Prometheus scrapes ten times a second here, usually once in 15 seconds.

pip install "agentrt[opentelemetry,prometheus]" opentelemetry-sdk; without, these are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.observer import Observer
from agentrt.trace_record import record

SCRAPE_S = 0.1
EVENTS = [name for name, value in vars(Observer).items() if callable(value) and name[0] != "_"]
Way = Callable[[Engine, "Spent"], AbstractAsyncContextManager[None]]


class Spent:
    """Processor seconds of callbacks. More than one thread adds to it, each to a key of its own."""

    def __init__(self) -> None:
        self._by_event: dict[str, float] = dict.fromkeys([*EVENTS, "scrape"], 0.0)
        self.num_calls = 0

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self._by_event[name] += time.thread_time() - began
                self.num_calls += 1

        return run

    @property
    def seconds(self) -> float:
        return sum(self._by_event.values())


class Timed(Observer):
    """An observer whose callbacks are timed."""

    def __init__(self, observer: Observer, spent: Spent) -> None:
        for name in EVENTS:
            setattr(self, name, spent.timed(name, getattr(observer, name)))


@contextmanager
def timing(engine: Engine, spent: Spent) -> Iterator[None]:
    """Time the observers that are attached now."""
    observers = engine._open.loop.observers
    attached = observers._all
    observers._all = tuple(Timed(each, spent) for each in attached)
    try:
        yield
    finally:
        observers._all = attached


@asynccontextmanager
async def recording(engine: Engine, spent: Spent) -> AsyncIterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        async with record(engine, Path(folder, "run.jsonl")):
            with timing(engine, spent):
                yield


@asynccontextmanager
async def telemetry(engine: Engine, spent: Spent) -> AsyncIterator[None]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from agentrt.adapters.opentelemetry import instrument

    tracers, meters = TracerProvider(), MeterProvider([InMemoryMetricReader()])
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    with (
        instrument(engine, tracer_provider=tracers, meter_provider=meters),
        timing(engine, spent),
    ):
        yield
    tracers.shutdown()
    meters.shutdown()


@asynccontextmanager
async def scraping(engine: Engine, spent: Spent) -> AsyncIterator[None]:
    import prometheus_client

    from agentrt.adapters.prometheus import AgentrtCollector

    registry = prometheus_client.CollectorRegistry()
    registry.register(AgentrtCollector(engine))
    scrape = spent.timed("scrape", lambda: prometheus_client.generate_latest(registry))

    async def always() -> None:
        while True:
            scrape()
            await asyncio.sleep(SCRAPE_S)

    task = asyncio.create_task(always())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def alone(engine: Engine, spent: Spent) -> AsyncIterator[None]:
    yield


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {"recording": recording}
    if find_spec("opentelemetry") and find_spec("opentelemetry.sdk"):
        found["OpenTelemetry"] = telemetry
    if find_spec("prometheus_client"):
        found["Prometheus"] = scraping
    return found


async def round_of(engine: Engine, way: Way, num: int, arguments: Any) -> tuple[float, float, int]:
    """Seconds of the processor in callbacks, and in all; how often there was a callback."""
    spent = Spent()
    options = GenerateOptions(max_tokens=arguments.tokens, ignore_eos=True)

    async def consume(stream: int) -> None:
        prompt = [1 + stream, 1 + num % 40_000, *range(100, 300)]  # none is in the cache
        async for _ in engine.stream(prompt, options):
            pass

    async with way(engine, spent):
        began = time.process_time()
        await asyncio.gather(*map(consume, range(arguments.streams)))
        whole_s = time.process_time() - began
    return spent.seconds, whole_s, spent.num_calls


async def run(arguments: argparse.Namespace) -> None:
    async with Engine(
        config=EngineConfig(disk_kv_bytes=0, speculation=False, device_kv_bytes=1 << 30)
    ) as engine:
        await round_of(engine, alone, 0, arguments)
        number = 0
        for name, way in ways().items():
            shares, ratios, each_us = [], [], []
            for _ in range(arguments.rounds):
                number += 2
                _, bare_s, _ = await round_of(engine, alone, number, arguments)
                spent_s, whole_s, calls = await round_of(engine, way, number + 1, arguments)
                shares.append(spent_s / whole_s)
                ratios.append(whole_s / bare_s)
                each_us.append(1e6 * spent_s / calls)
            print(
                f"{name:14} {100 * statistics.median(shares):.3f} % of the step time, "
                f"{statistics.median(each_us):.0f} us a call; "
                f"a round x {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
