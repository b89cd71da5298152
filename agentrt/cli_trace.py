"""The command `trace`: a recorded run becomes a page with its timeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from agentrt.errors import RequestInvalid
from agentrt.trace_page import page
from agentrt.trace_record import read_lines
from agentrt.trace_timeline import timeline

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands


def add_trace_parser(commands: Commands) -> None:
    """`trace RECORDING`."""
    text = "turn a recording (see `bench --record`) into a page with its timeline"
    parser = commands.add_parser("trace", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=_trace)
    parser.add_argument("recording", type=Path, help="the .jsonl file")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="HTML", help="(default: beside the recording)"
    )


async def _trace(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.recording.with_suffix(".html")
    await anyio.to_thread.run_sync(write_page, arguments.recording, out)
    print(out)


def write_page(recording: Path, out: Path) -> None:
    """Read a recording and write its page. Raises RequestInvalid."""
    try:
        with recording.open(encoding="utf-8") as lines:
            read = read_lines(lines, str(recording))
    except (OSError, UnicodeDecodeError) as exc:
        raise RequestInvalid(f"the recording {recording} cannot be read: {exc}") from exc
    text = page(timeline(read))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise RequestInvalid(f"the page {out} cannot be written: {exc}") from exc
