"""The command line: `python -m agentrt run | chat | bench | info | cache | trace | serve`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from agentrt import __version__, cli_bench, cli_cache, cli_dialogue, cli_info, cli_serve, cli_trace
from agentrt.errors import AgentrtError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # what shells report of a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Arguments that do not parse exit with 2."""
    arguments = _parser().parse_args(argv)
    try:
        asyncio.run(arguments.command(arguments))
    except AgentrtError as exc:
        print(f"agentrt: error: {' '.join(str(exc).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agentrt",
        description="Language-model agents in this process: no server, no second process.",
    )
    parser.add_argument("--version", action="version", version=f"agentrt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_dialogue.add_run_parser(commands)
    cli_dialogue.add_chat_parser(commands)
    cli_bench.add_bench_parser(commands)
    cli_info.add_info_parser(commands)
    cli_cache.add_cache_parser(commands)
    cli_trace.add_trace_parser(commands)
    cli_serve.add_serve_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
