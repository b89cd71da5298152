"""Random sessions for as long as you like, in budgets that are checked at every step.

    python benchmarks/soak.py [--minutes 30] [--sessions 8] [--seed 0]

Sessions of SmolLM2 come and go over a device pool, a host tier and a disk tier that are all too
small for them: turns of random length, tools that take their time, sessions that are left in the
middle of a turn, erased, or opened again by their id. At every step the bytes in use of each tier
are compared with its limit (the disk's as the file system tells them), every five seconds all books
are checked, and resident memory is noted. Ends with status 1 if a limit was passed, or if memory
still grew in the second half of the time.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path

from attrs import define, field

from agentrt import Engine, EngineConfig, GenerateOptions, Session
from agentrt.cache.host import HostTier
from agentrt.config import default_cache_dir
from agentrt.engine_tiers import STORE_FOLDER
from agentrt.metrics import Stats
from agentrt.observer import Observer
from agentrt.registry import locate
from agentrt.scheduler import Plan

DEVICE_BYTES, HOST_BYTES, DISK_BYTES = 96 << 20, 64 << 20, 128 << 20
LONGEST_TOKENS = 1500  # of a session that goes on
CHECK_APART_S = 5.0
MOST_GROWTH = 1.02  # of resident memory, from the third quarter of the time to the last
WORDS = ["flight", "fare", "change", "refund", "seat", "gate", "policy", "member", "date", "city"]


@define(eq=False)
class Budgets(Observer):
    """The most that each tier ever used, looked at with every step; on the step thread."""

    engine: Engine
    folder: Path
    num_steps: int = 0
    most: dict[str, int] = field(factory=lambda: dict.fromkeys(("device", "host", "disk"), 0))
    limits: dict[str, int] = field(
        factory=lambda: {"device": DEVICE_BYTES, "host": HOST_BYTES, "disk": DISK_BYTES}
    )

    def launched(self, plan: Plan, now: float) -> None:
        self.num_steps += 1
        in_files = 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a new index takes the old one's place
                in_files += path.stat().st_size
        used = {
            "device": self.engine.stats().kv_used_bytes,
            "host": self._host.reserved_bytes,
            "disk": in_files,
        }
        for tier, num_bytes in used.items():
            self.most[tier] = max(self.most[tier], num_bytes)

    @property
    def _host(self) -> HostTier:
        mover = self.engine._open.loop.scheduler.mover
        assert mover is not None
        return mover.tiers._host

    @property
    def passed(self) -> list[str]:
        """The tiers whose limit was passed."""
        return [tier for tier, limit in self.limits.items() if self.most[tier] > limit]


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def words(rng: random.Random, num: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num))


@define(eq=False)
class Traffic:
    """Sessions one after the other, by several hands at once."""

    engine: Engine
    rng: random.Random
    until_s: float
    counts: Counter[str] = field(factory=Counter)

    async def hand(self, number: int) -> None:
        while time.monotonic() < self.until_s:
            rng = self.rng
            options = GenerateOptions(
                max_tokens=rng.randrange(1, 60),
                temperature=rng.choice([0.0, 1.0]),
                ignore_eos=True,
            )
            system = words(random.Random(rng.randrange(3)), 200)  # some begin alike
            saved_as = rng.choice([None, f"hand{number}"])
            async with self.engine.session(system=system, options=options, id=saved_as) as session:
                self.counts["sessions"] += 1
                self.counts["reopened"] += len(session.messages) > 1
                await self.turns(session)

    async def turns(self, session: Session) -> None:
        for _ in range(self.rng.randrange(1, 6)):
            await self.turn(session)
            if len(session.token_ids) > LONGEST_TOKENS or self.rng.random() < 0.05:
                self.counts["erased"] += 1
                await session.erase()
                return
            async with session.tool_pause(self.rng.choice(["quick", "slow"])):
                await asyncio.sleep(self.rng.choice([0.0, 0.05, 0.5]))

    async def turn(self, session: Session) -> None:
        leaves = self.rng.random() < 0.1
        async with aclosing(session.stream(words(self.rng, self.rng.randrange(5, 150)))) as events:
            async for _ in events:
                if leaves and self.rng.random() < 0.3:
                    self.counts["left"] += 1
                    return
        self.counts["turns"] += 1

    async def check(self) -> list[int]:
        """All books, every now and then; returns resident memory each time."""
        resident = []
        while time.monotonic() < self.until_s:
            await asyncio.sleep(CHECK_APART_S)
            await self.engine.check()
            disk = self.engine._open.disk
            assert disk is not None
            disk.check()
            resident.append(await asyncio.to_thread(resident_bytes))
        return resident


async def soak(model: str, folder: Path, seconds: float, num_sessions: int, seed: int) -> bool:
    """Run, print, and say whether all was well."""
    config = EngineConfig(
        cache_dir=folder,
        device_kv_bytes=DEVICE_BYTES,
        host_kv_bytes=HOST_BYTES,
        disk_kv_bytes=DISK_BYTES,
        max_context_tokens=3072,
    )
    async with Engine(model, config) as engine:
        budgets = Budgets(engine, folder / STORE_FOLDER)
        traffic = Traffic(engine, random.Random(seed), time.monotonic() + seconds)
        with engine._open.loop.observers.attached(budgets):
            resident, *_ = await asyncio.gather(
                traffic.check(), *(traffic.hand(i) for i in range(num_sessions))
            )
        stats = engine.stats()
    growth = report(budgets, traffic, stats, resident)
    return not budgets.passed and growth <= MOST_GROWTH


def report(budgets: Budgets, traffic: Traffic, stats: Stats, resident: list[int]) -> float:
    """Print what was seen; returns how resident memory grew in the second half."""
    print(f"{budgets.num_steps:,} steps; {dict(traffic.counts)}")
    print(
        f"{stats.finished:,} requests, {stats.cancelled} cancelled, {stats.preempted} preempted; "
        f"{stats.prompt_tokens:,} prompt tokens: {stats.cached_tokens:,} from the device, "
        f"{stats.loaded_tokens['host']:,} from the host, {stats.loaded_tokens['disk']:,} from disk"
    )
    for tier, most in budgets.most.items():
        limit = budgets.limits[tier]
        verdict = "passed" if tier in budgets.passed else "kept"
        print(f"{tier}: at most {most:,} of {limit:,} bytes ({most / limit:.1%}): {verdict}")
    half = len(resident) // 2
    middle, last = resident[half : half + max(half // 2, 1)], resident[-max(half // 2, 1) :]
    growth = statistics.median(last) / statistics.median(middle)
    print(f"resident memory: {resident[-1] / 2**20:,.0f} MiB, {growth:.3f} of what it was at half")
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, seconds = str(locate("smollm2-135m", default_cache_dir())), arguments.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        run = soak(model, Path(folder), seconds, arguments.sessions, arguments.seed)
        was_well = asyncio.run(run)
    sys.exit(not was_well)


if __name__ == "__main__":
    main()
