"""The engine of a command: its options, and what stderr shows while it loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TextIO

from attrs import define

from agentrt.config import EngineConfig
from agentrt.engine import Engine
from agentrt.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Command = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]


def add_command(commands: Commands, name: str, text: str, command: Command) -> Any:
    """A command's parser, with the options of its engine."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=command)
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a folder in Hugging Face layout, a .gguf file, org/name on a hub, or a registered "
        "name (default: %(default)s, fetched once)",
    )
    parser.add_argument(
        "--max-context", type=int, metavar="TOKENS", help="context (default: the model's own)"
    )
    parser.add_argument(
        "--progress",
        action="store_true",
        help="show on stderr how far loading is, even where that is no terminal",
    )
    return parser


def add_random_weights(parser: argparse.ArgumentParser) -> None:
    """The option for a shape without weight files."""
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="run the shape of a folder that holds config.json alone",
    )


@asynccontextmanager
async def open_engine(arguments: argparse.Namespace) -> AsyncGenerator[Engine]:
    """The engine that the arguments ask for."""
    config = EngineConfig(
        max_context_tokens=arguments.max_context,
        random_weights=getattr(arguments, "random_weights", False),
    )
    shown = arguments.progress or sys.stderr.isatty()
    progress = LoadingProgress(sys.stderr) if shown else None
    engine = Engine(arguments.model, config, progress=progress)
    try:
        await engine.__aenter__()
    finally:
        if progress is not None:
            progress.clear()
    try:
        yield engine
    finally:
        await engine.aclose()


@define
class LoadingProgress:
    """Called from the thread that loads: writes a line whenever a stage is a tenth further."""

    out: TextIO
    _shown: tuple[str, int] = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 10
        if (stage, tenths) == self._shown:
            return
        self._shown = stage, tenths
        start, end = ("\r\x1b[K", "") if self.out.isatty() else ("", "\n")
        self.out.write(f"{start}{stage} {10 * tenths} %{end}")
        self.out.flush()

    def clear(self) -> None:
        """Take the line away, on a terminal."""
        if self.out.isatty():
            self.out.write("\r\x1b[K")
            self.out.flush()
