"""The command `serve`: OpenAI's API over an engine, on a port."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from agentrt.cli_engine import add_command, open_engine
from agentrt.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands

LEAST_TOKEN_CHARACTERS = 16


def add_serve_parser(commands: Commands) -> None:
    """`serve`."""
    parser = add_command(commands, "serve", "answer OpenAI's API on a port", _serve)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen at (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the bearer token that requests must have; needed unless the host is loopback",
    )
    add("--max-body-bytes", type=int, default=8 << 20, metavar="N", help="(%(default)s)")
    add("--max-requests", type=int, default=256, metavar="N", help="at once (%(default)s)")


async def _serve(arguments: argparse.Namespace) -> None:
    server, uvicorn = _imported("agentrt.adapters.openai.server"), _imported("uvicorn")
    token = await anyio.to_thread.run_sync(_token, arguments.token_file)
    if token is None and not server.is_loopback(arguments.host):
        raise ConfigError(f"--host {arguments.host} is no loopback address: give --token-file too")
    with _listening(arguments.host, arguments.port) as listener:
        async with open_engine(arguments) as engine:
            api = import_module("agentrt.adapters.openai").Api(engine)
            application = server.Application(
                api=api,
                token=token,
                most_body_bytes=arguments.max_body_bytes,
                most_requests=arguments.max_requests,
            )
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {api.model_ids[-1]} at http://{shown}:{port}/v1", flush=True)
            await run(uvicorn, application, listener)
            await api.aclose()


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--token-file {file} cannot be read: {exc}") from exc
    if len(token) < LEAST_TOKEN_CHARACTERS:
        raise ConfigError(
            f"--token-file {file} has a token of {len(token)} characters: give it "
            f"{LEAST_TOKEN_CHARACTERS} or more"
        )
    return token


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket, taken before the model is loaded: a port in use is told at once."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port}: give one below {1 << 16}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as exc:
        raise ConfigError(f"--host {host} --port {port}: {exc}") from exc
    with listener:
        yield listener


async def run(uvicorn: Any, application: Any, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then nobody new is let in, and the turns that run may end. A
    second SIGINT cancels them."""
    config = uvicorn.Config(application, lifespan="off", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    # uvicorn's own handlers raise the signal once more at the end, which would kill the process
    # before the engine has saved what its tiers are to keep.
    server.capture_signals = _no_signals
    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, server.handle_exit, number, None)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextmanager
def _no_signals() -> Iterator[None]:
    yield


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as exc:
        raise MissingExtra(f"serve needs {exc.name}: pip install 'agentrt[serve]'") from exc
