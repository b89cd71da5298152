"""Recording a run: what the engine does, as lines of JSON that `python -m agentrt trace` shows."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import anyio.to_thread
from attrs import define, field

from agentrt.errors import RequestInvalid
from agentrt.observer import Observer, Scope

if TYPE_CHECKING:
    import os

    from agentrt.engine import Engine
    from agentrt.metrics import Stats
    from agentrt.request import Request
    from agentrt.scheduler import Plan, Work
    from agentrt.types import FinishReason, ToolCall, ToolResult

FORMAT = 1
SAMPLE_S = 0.02  # how often tokens and bytes by tier are noted: a page has about a thousand pixels
FLUSH_S = 0.25  # a waking event loop for each step would cost more than the lines themselves
Line = dict[str, Any]


@asynccontextmanager
async def record(engine: Engine, path: str | os.PathLike[str]) -> AsyncGenerator[None]:
    """Write what `engine` does during the block to the file `path`, which is replaced.

    No prompt, text or argument is written: names of agents and tools, numbers and times are.
    Raises RequestInvalid where the file cannot be written; the engine runs on in any case.
    """
    parts = engine._open
    recorder = Recorder(parts.stats)
    recorder.lines.append(_header(parts.stats(), parts.loop.clock()))
    writer = await anyio.to_thread.run_sync(Writer.open, Path(path), recorder.lines)
    flushing = asyncio.create_task(writer.flush_always())
    try:
        with parts.loop.observers.attached(recorder):
            yield
    finally:
        flushing.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(flushing, return_exceptions=True)
            recorder.close(parts.loop.clock())
            await anyio.to_thread.run_sync(writer.close)


@define(eq=False)
class Writer:
    """Owns the file, and takes lines out of `lines`. Once the file cannot be written it throws
    them away, since nobody may wait for a disk: `close` tells of it."""

    _lines: deque[Line]
    _file: TextIO
    _error: OSError | None = field(default=None, init=False)

    @classmethod
    def open(cls, path: Path, lines: deque[Line]) -> Writer:
        try:
            return cls(lines, path.open("w", encoding="utf-8"))
        except OSError as exc:
            raise RequestInvalid(f"the recording {path} cannot be written: {exc}") from exc

    async def flush_always(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.write)

    def write(self) -> None:
        """Write what is there by now."""
        batch = [self._lines.popleft() for _ in range(len(self._lines))]
        try:
            if self._error is None:
                self._file.writelines(_text(line) for line in batch)
        except OSError as exc:
            self._error = exc

    def close(self) -> None:
        """Write the rest. Raises RequestInvalid if the file is not whole."""
        self.write()
        try:
            self._file.close()
        except OSError as exc:
            self._error = self._error or exc
        if self._error is not None:
            raise RequestInvalid(
                f"the recording {self._file.name} is not whole: {self._error}"
            ) from self._error


def _text(line: Line) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def _header(stats: Stats, now: float) -> Line:
    return {
        "kind": "recording",
        "format": FORMAT,
        "at": now,
        "model": stats.model,
        "kernels": stats.kernels,
        "weights": stats.weights,
        "device_bytes": stats.kv_bytes,
        "host_bytes": 0 if stats.lower is None else stats.lower.host_limit_bytes,
    }


@define(eq=False)
class Recorder(Observer):
    """Makes a line of each event; whoever owns it takes them from `lines`.

    The step thread appends and reads `_steps`, `_sampled_s`; the event loop's thread appends and
    owns `_tools` and `_turns`.
    """

    _stats: Callable[[], Stats]
    lines: deque[Line] = field(factory=deque, init=False)
    _steps: dict[int, Line] = field(factory=dict, init=False)  # launched, by identity of the plan
    _sampled_s: float = field(default=0.0, init=False)
    _turns: dict[int, Line] = field(factory=dict, init=False)
    _tools: dict[int, Line] = field(factory=dict, init=False)  # by identity of the call

    def close(self, now: float) -> None:
        """Note where things stand at the end: also tools and turns that go on."""
        for line in (*self._tools.values(), *self._turns.values()):
            self.lines.append({**line, "end": None})
        self._sample(now)
        self.lines.append({"kind": "end", "at": now})

    def submitted(self, request: Request, scope: Scope, now: float) -> None:
        self.lines.append(
            {
                "kind": "submitted",
                "at": now,
                "request": request.id,
                "agent": scope.agent,
                "turn": scope.turn,
                "prompt_tokens": request.num_prompt_tokens,
            }
        )

    def launched(self, plan: Plan, now: float) -> None:
        prefill = [work for work in plan.work if _is_prefill(work)]
        decode = [work.request.id for work in plan.work if not _is_prefill(work)]
        self._steps[id(plan)] = {
            "kind": "step",
            "begin": now,
            "rows": plan.num_rows,
            "prefill": [[work.request.id, work.num_tokens] for work in prefill],
            "decode": decode,
        }

    def collected(self, plan: Plan, now: float) -> None:
        step = self._steps.pop(id(plan), None)
        if step is not None:  # else it was launched before the recording began
            self.lines.append({**step, "end": now})
        if now - self._sampled_s >= SAMPLE_S:
            self._sample(now)

    def ended(self, request: Request, outcome: FinishReason | BaseException, now: float) -> None:
        own = request.origins.own
        self.lines.append(
            {
                "kind": "ended",
                "at": now,
                "request": request.id,
                "reason": outcome if isinstance(outcome, str) else type(outcome).__name__,
                "first_token": request.first_token_s,
                "tokens": {**own.tiers, "computed": own.computed},
                "output_tokens": request.num_output_tokens,
            }
        )

    def turn_began(self, scope: Scope, now: float) -> None:
        assert scope.turn is not None
        line = {"kind": "turn", "agent": scope.agent, "turn": scope.turn, "begin": now}
        self._turns[scope.turn] = line

    def turn_ended(self, scope: Scope, error: BaseException | None, now: float) -> None:
        assert scope.turn is not None
        line = self._turns.pop(scope.turn, None)
        if line is not None:
            failed = None if error is None else type(error).__name__
            self.lines.append({**line, "end": now, "error": failed})

    def tool_began(self, scope: Scope, call: ToolCall, now: float) -> None:
        self._tools[id(call)] = {
            "kind": "tool",
            "agent": scope.agent,
            "turn": scope.turn,
            "name": call.name,
            "begin": now,
        }

    def tool_ended(
        self, scope: Scope, call: ToolCall, result: ToolResult | None, now: float
    ) -> None:
        line = self._tools.pop(id(call), None)
        if line is not None:
            is_error = result is not None and result.is_error
            self.lines.append({**line, "end": now, "is_error": is_error})

    def _sample(self, now: float) -> None:
        self._sampled_s = now
        stats = self._stats()
        lower = stats.lower
        host_bytes = 0 if lower is None else lower.host_bytes
        disk_bytes = 0 if lower is None or lower.disk is None else lower.disk.payload_bytes
        self.lines.append(
            {
                "kind": "sample",
                "at": now,
                "tokens": {
                    "device": stats.cached_tokens,
                    **stats.loaded_tokens,
                    "computed": stats.computed_tokens,
                },
                "output_tokens": stats.output_tokens,
                "bytes": {"device": stats.kv_used_bytes, "host": host_bytes, "disk": disk_bytes},
                "waiting": stats.waiting,
                "running": stats.running,
            }
        )


def _is_prefill(work: Work) -> bool:
    """Whether it computes prompt, or output once more; a decode row computes the newest token."""
    is_prompt = work.start < work.request.num_prompt_tokens
    return is_prompt or work.num_tokens - work.num_draft > 1


def read_lines(lines: Iterable[str], where: str) -> list[Line]:
    """A recording's lines. Raises RequestInvalid, naming the line."""
    read: list[Line] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError as exc:
            raise RequestInvalid(f"{where}, line {number}: not JSON: {exc}") from exc
        if not isinstance(line, dict) or (number == 1) != (line.get("kind") == "recording"):
            raise RequestInvalid(f"{where}, line {number}: not a recording of agentrt")
        read.append(line)
    if not read:
        raise RequestInvalid(f"{where} is empty: not a recording of agentrt")
    if read[0]["format"] != FORMAT:
        raise RequestInvalid(f"{where} has format {read[0]['format']}, this version reads {FORMAT}")
    return read
