"""The command `trace`: a recorded run becomes a page with its timeline."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from agentrt.errors import RequestInvalid
from agentrt.trace_page import page
from agentrt.trace_record import read_lines
from agentrt.trace_timeline import timeline

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_BROWSER_S = 60.0
_PICTURE = (1200, 680)  # pixels


def add_trace_parser(commands: Commands) -> None:
    """`trace RECORDING`."""
    text = "turn a recording (see `bench --record`) into a page with its timeline"
    parser = commands.add_parser("trace", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=_trace)
    parser.add_argument("recording", type=Path, help="the .jsonl file")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="HTML", help="(default: beside the recording)"
    )
    parser.add_argument(
        "--png", type=Path, metavar="PNG", help="also a picture of the page, drawn by Chromium"
    )


async def _trace(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.recording.with_suffix(".html")
    await anyio.to_thread.run_sync(write_page, arguments.recording, out)
    print(out)
    if arguments.png is not None:
        await anyio.to_thread.run_sync(draw, out, arguments.png)
        print(arguments.png)


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


def draw(page_path: Path, picture: Path) -> None:
    """A picture of a page's top, by a Chromium without a window. Raises RequestInvalid."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RequestInvalid(f"a picture needs Chromium: none of {', '.join(BROWSERS)} is there")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            "--no-sandbox",  # the page is our own, and root has no sandbox
            f"--user-data-dir={profile}",
            f"--window-size={_PICTURE[0]},{_PICTURE[1]}",
            f"--screenshot={picture.resolve()}",
            page_path.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_BROWSER_S, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise RequestInvalid(f"{browser} drew nothing within {_BROWSER_S:.0f} s") from exc
    if done.returncode or not picture.is_file():
        last = done.stderr.strip().splitlines()[-1:]
        raise RequestInvalid(f"{browser} did not write {picture}: {' '.join(last)}")
