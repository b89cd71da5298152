"""What the host does for a prompt whose beginning is cached, from the call to the first token.

    python benchmarks/admission.py [--tokens N ...] [--new 200] [--tiers off host disk]
        [--rounds 15] [--quantile 0.5] [--profile] [--launches N]

An engine whose device computes nothing and answers at once: all that is left is Python, with blocks
and chunks of 64 tokens as on a GPU. A prompt is computed once, then asked for with other new tokens
behind it, right after the answer before: what is saved then is saved beside it. Medians (or another
quantile, on a busy machine) in ms, of

    call     from `stream` to the hand-over to the step thread
    wake     until the step thread plans
    plan     until it launches: order, admission, transfers that begin
    inputs   of the launch: the block table and the step's rows (`cuda_inputs`, `step_rows`)
    token    from there to the caller's first event
    first    all of it

`--profile` shows what the step thread does meanwhile. `--launches N` then times N foreign calls
that let go of the interpreter's lock, as a prefill on a GPU launches kernel by kernel: alone,
beside a save of 4,000 chunks that waits for nothing, and beside one that waits at the gate.
"""

import argparse
import asyncio
import cProfile
import ctypes
import pstats
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.cache import Copy
from agentrt.cache.keys import Fingerprint
from agentrt.chat import Chat
from agentrt.cuda_inputs import BlockTables
from agentrt.decode_works import DecodeWorks
from agentrt.engine_parts import EngineParts, build_loop
from agentrt.models.base import ModelSpec, RopeSpec
from agentrt.mover import Job, Part
from agentrt.poster import poster
from agentrt.precedence import Precedence
from agentrt.scheduler import Plan, Work
from agentrt.step_rows import mixed_work
from agentrt.transfer import HostCopier, TransferThread

BLOCK_TOKENS = 64
TOKEN_BYTES = 64  # of KV: copies cost little beside what is said about them
VOCAB, DIM = 50_000, 64
CONTEXT = 40_960
POOL_TOKENS = 2_000_000
ONE = GenerateOptions(max_tokens=1, temperature=0.0, ignore_eos=True)
STAGES = ("call", "wake", "plan", "inputs", "token", "first")


@frozen
class Answered:
    """A ticket whose tokens are known."""

    sampling: tuple[Work, ...]
    runs_ahead: bool = True


@define(eq=False)
class NullRunner:
    """A device that computes nothing. `marks` are the times of the newest request's stages."""

    num_blocks: int
    marks: dict[str, float] = field(factory=dict)
    tables: BlockTables = field(init=False)
    draft_limits: None = None

    def __attrs_post_init__(self) -> None:
        self.tables = BlockTables(64, CONTEXT // BLOCK_TOKENS + 2, torch.device("cpu"))

    def launch(self, plan: Plan) -> Answered:
        self.marks.setdefault("launch", time.perf_counter())
        works = sorted(plan.work, key=lambda work: work.num_tokens > 1)
        slots, cells, blocks = self.tables.place(works)
        np.array(cells, dtype=np.int32), np.array(blocks, dtype=np.int32)
        mixed_work(works, DecodeWorks.of([w for w in works if w.num_tokens == 1], DIM), slots)
        self.marks.setdefault("inputs", time.perf_counter())
        return Answered(tuple(work for work in plan.work if work.samples))

    def collect(self, ticket: Answered) -> list[list[tuple[int, None]]]:
        return [[(7, None)] for _ in ticket.sampling]

    def copy(self, copies: Sequence[Copy]) -> None:
        """There is nothing to copy."""

    def copier(self) -> HostCopier:
        shape = (1, 2, self.num_blocks, 1, BLOCK_TOKENS, TOKEN_BYTES // 2)
        return HostCopier(np.zeros(shape, dtype=np.uint8))

    def close(self) -> None:
        """Nothing to free."""


class NullEngine(Engine):
    """An engine above a NullRunner; `wrap` sees the loop before it runs."""

    def __init__(self, config: EngineConfig, wrap: Callable[[Any], None]) -> None:
        super().__init__("nothing", config)
        self.wrap = wrap

    def _open_parts(self, event_loop: Any, abandoned: Any) -> EngineParts:
        spec = _spec()
        resolved = self.config.resolve(
            device="cuda",
            kv_token_bytes=TOKEN_BYTES,
            model_context_tokens=CONTEXT,
            free_device_bytes=TOKEN_BYTES * POOL_TOKENS * 2,
        )
        fingerprint = Fingerprint(
            namespace="",
            model_digest="nothing",
            layout="",
            dtype="",
            arithmetic="",
            token_bytes=TOKEN_BYTES,
        )
        self.runner = NullRunner(resolved.num_blocks)
        loop, tiers = build_loop(
            self.config,
            resolved,
            fingerprint,
            self.runner,
            poster(event_loop, gives_way=False),
            Precedence(),
            device="cuda",
        )
        self.wrap(loop)
        return EngineParts(
            loop=loop,
            chat=Chat(None, None, VOCAB, frozenset()),
            spec=spec,
            model_name="nothing",
            kernels="none",
            weights="none",
            fingerprint=fingerprint,
            disk=tiers.disk,
            disk_problem=tiers.problem,
        )


def _spec() -> ModelSpec:
    return ModelSpec(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        norm_eps=1e-5,
        max_context_tokens=CONTEXT,
        rope=RopeSpec(theta=1e4),
        tie_embeddings=True,
        eos_token_ids=frozenset(),
    )


def config_of(tiers: str, folder: Path) -> EngineConfig:
    return EngineConfig(
        cache_dir=folder,
        device_kv_bytes=POOL_TOKENS * TOKEN_BYTES,
        host_kv_bytes=0 if tiers == "off" else POOL_TOKENS * TOKEN_BYTES,
        disk_kv_bytes=POOL_TOKENS * TOKEN_BYTES if tiers == "disk" else 0,
        max_context_tokens=CONTEXT,
    )


async def first_token(engine: NullEngine, prompt: list[int]) -> dict[str, float]:
    """One request's stages, in seconds."""
    marks = engine.runner.marks
    marks.clear()
    begin = time.perf_counter()
    async for _ in engine.stream(prompt, ONE):
        break
    end = time.perf_counter()
    return {
        "call": marks["submitted"] - begin,
        "wake": marks["planned"] - marks["submitted"],
        "plan": marks["launch"] - marks["planned"],
        "inputs": marks["inputs"] - marks["launch"],
        "token": end - marks["inputs"],
        "first": end - begin,
    }


def _noting(engine: list[NullEngine], profile: cProfile.Profile | None) -> Callable[[Any], None]:
    """Have a loop note when it gets a request and when it plans."""

    def wrap(loop: Any) -> None:
        marks, plan, submit = engine[0].runner.marks, loop.scheduler.plan, loop.submit

        def planned(now: float) -> Plan:
            marks.setdefault("planned", time.perf_counter())
            return plan(now)

        def submitted(request: Any) -> None:
            marks["submitted"] = time.perf_counter()
            marks.pop("planned", None)
            submit(request)

        # By the class, as both have slots.
        for owner, own in (
            (loop.scheduler, {"plan": lambda _, now: planned(now)}),
            (loop, {"submit": lambda _, request: submitted(request)}),
        ):
            owner.__class__ = type("Noting", (type(owner),), {"__slots__": (), **own})
        if profile is not None:
            profile.enable()

    return wrap


async def measure(arguments: argparse.Namespace, tiers: str, num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    profile = cProfile.Profile() if arguments.profile else None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        engines: list[NullEngine] = []
        config = config_of(tiers, Path(folder))
        engines.append(NullEngine(config, _noting(engines, profile)))
        async with engines[0] as engine:
            for _ in range(arguments.rounds):
                prompt = [rng.randrange(VOCAB) for _ in range(num_tokens)]
                await first_token(engine, prompt)
                fresh = [rng.randrange(VOCAB) for _ in range(arguments.new)]
                found.append(await first_token(engine, prompt + fresh))
                await settled(engine)
            stats = engine.stats()
    assert stats.cached_tokens >= arguments.rounds * (num_tokens - BLOCK_TOKENS)
    row = [1e3 * _quantile([each[stage] for each in found], arguments.quantile) for stage in STAGES]
    print(f"{tiers:5} {num_tokens:7,} " + " ".join(f"{value:8.3f}" for value in row), flush=True)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@define
class Foreign:
    """Calls that let go of the interpreter's lock for some microseconds, as launches and copies do.
    Also a transfer thread's copier."""

    num_bytes: int
    num_calls: int = 0
    _memory: Any = field(init=False)
    _library: Any = field(factory=lambda: ctypes.CDLL(None), init=False)

    def __attrs_post_init__(self) -> None:
        self._memory = np.zeros(self.num_bytes, dtype=np.uint8)

    def call(self) -> None:
        address = ctypes.c_void_p(self._memory.ctypes.data)
        self._library.memset(address, 0, ctypes.c_size_t(self.num_bytes))
        self.num_calls += 1

    def begin(self) -> None:
        """Nothing comes before."""

    def save(self, part: Part, block_ids: tuple[int, ...], after: None) -> None:
        for _ in part.places(BLOCK_TOKENS, block_ids):
            self.call()

    def sync(self) -> None:
        """Calls are done when they return."""


def launches_ms(num_launches: int, *, has_save: bool, has_gate: bool) -> tuple[float, int]:
    """How long so many launches take, and how many blocks a save beside them copies meanwhile."""
    gate, copier, device = Precedence(), Foreign(4096), Foreign(128 << 10)
    transfers = TransferThread(
        copier, None, lambda *_: None, gate=gate if has_gate else None, most_held_blocks=1 << 20
    )
    parts = tuple(
        Part(start=start, num_tokens=64, first=start, end=start + 64)
        for start in range(0, 64 * 4000, 64)
    )
    gate.work()
    if has_save:
        blocks = tuple(range(len(parts)))
        transfers.submit(Job(is_load=False, parts=parts, chunks=(), block_ids=blocks, lease=None))
    begin = time.perf_counter()
    for _ in range(num_launches):
        device.call()
    took, num_copied = time.perf_counter() - begin, copier.num_calls
    gate.rest(is_awaited=False)
    transfers.close()
    return 1e3 * took, num_copied


def measure_launches(arguments: argparse.Namespace) -> None:
    ways = {
        "alone": {"has_save": False, "has_gate": False},
        "beside a save": {"has_save": True, "has_gate": False},
        "beside a save at the gate": {"has_save": True, "has_gate": True},
    }
    for name, way in ways.items():
        found = [launches_ms(arguments.launches, **way) for _ in range(arguments.rounds)]
        took, copied = (
            _quantile(list(each), arguments.quantile) for each in zip(*found, strict=True)
        )
        print(f"{arguments.launches} launches {name}: {took:.1f} ms; {copied:.0f} blocks copied")


async def settled(engine: NullEngine) -> None:
    """Let saves end: each round begins with an idle engine."""
    mover = engine._open.loop.scheduler.mover
    deadline = time.monotonic() + 10
    while mover is not None and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
        if not mover.num_in_flight and not mover.tiers.wants_poll:
            break
    await asyncio.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 16384, 32768])
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiers", nargs="*", default=["off", "host", "disk"])
    parser.add_argument("--launches", type=int, default=0)
    parser.add_argument("--quantile", type=float, default=0.5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print("tiers  tokens " + " ".join(f"{stage:>8}" for stage in STAGES))
    for tiers in arguments.tiers:
        for num_tokens in arguments.tokens:
            asyncio.run(measure(arguments, tiers, num_tokens))
    if arguments.launches:
        measure_launches(arguments)


if __name__ == "__main__":
    main()
