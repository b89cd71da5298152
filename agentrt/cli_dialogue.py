"""The commands `run` and `chat`: a session whose turns are streamed to the terminal.

The model's text goes to stdout; tool calls and their results go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, get_args

from agentrt.cli_engine import add_command, open_engine
from agentrt.errors import ConfigError
from agentrt.types import GenerateOptions, TextDelta, ToolCallArguments, ToolChoice, ToolResult

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands
    from agentrt.engine import Engine
    from agentrt.session import Session

QUIT = "/quit"
_CHUNK_BYTES = 1 << 16


def add_run_parser(commands: Commands) -> None:
    """`run PROMPT`."""
    parser = add_command(commands, "run", "answer one prompt and end", _run)
    parser.add_argument("prompt", metavar="PROMPT", help="the user's message")
    _add_dialogue_options(parser)


def add_chat_parser(commands: Commands) -> None:
    """`chat`."""
    text = f"talk with the model, a line a message; {QUIT} or end of input leaves"
    _add_dialogue_options(add_command(commands, "chat", text, _chat))


def _add_dialogue_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message (default: the chat template's)")
    add("--max-tokens", type=int, default=256, metavar="N", help="of an answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--seed", type=int, help="makes sampling repeatable")
    add(
        "--tools",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a function that the model may call; may be given several times",
    )
    add(
        "--tool-choice",
        choices=get_args(ToolChoice),
        default="auto",
        help="required: every turn begins with a call; once: it is one call, then an answer "
        "(%(default)s)",
    )


async def _run(arguments: argparse.Namespace) -> None:
    tools = [_find_tool(name) for name in arguments.tools]
    async with open_engine(arguments) as engine, _session(engine, arguments, tools) as session:
        await _show_turn(session, arguments.prompt)


async def _chat(arguments: argparse.Namespace) -> None:
    tools = [_find_tool(name) for name in arguments.tools]
    async with (
        open_engine(arguments) as engine,
        _session(engine, arguments, tools) as session,
        aclosing(_lines(sys.stdin.fileno())) as lines,
    ):
        _invite()
        async for line in lines:
            if line.strip() == QUIT:
                return
            if line.strip():
                await _show_turn(session, line)
            _invite()


def _session(engine: Engine, arguments: argparse.Namespace, tools: list[Any]) -> Session:
    options = GenerateOptions(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    return engine.session(
        system=arguments.system, tools=tools, options=options, tool_choice=arguments.tool_choice
    )


async def _show_turn(session: Session, text: str) -> None:
    async with aclosing(session.stream(text)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, ToolCallArguments):
                written = json.dumps(dict(event.call.arguments), ensure_ascii=False)
                print(f"[call] {event.call.name} {written}", file=sys.stderr)
            elif isinstance(event, ToolResult):
                kind = "error" if event.is_error else "result"
                print(f"[{kind}] {event.content}", file=sys.stderr)
    print(flush=True)


def _invite() -> None:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)


def _find_tool(name: str) -> Any:
    """The function that `module:function` names. Raises ConfigError."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"--tools {name}: give module:function ({exc})") from exc


async def _lines(descriptor: int) -> AsyncGenerator[str]:
    """The lines of a terminal, pipe or file.

    No thread waits in a read: one that still does would keep the program from ending on Ctrl-C.
    """
    held = b""
    while chunk := await _read(descriptor):
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if held:
        yield held.decode(errors="replace")


async def _read(descriptor: int) -> bytes:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # a regular file: there is nothing to wait for
        return os.read(descriptor, _CHUNK_BYTES)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, _CHUNK_BYTES)
