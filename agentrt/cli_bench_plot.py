"""A picture of a replay: time to first token and hit rate over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentrt.cli_workload import Turn
from agentrt.errors import MissingExtra, RequestInvalid

NUM_WINDOWS = 24


def windows(turns: Sequence[Turn], num_windows: int = NUM_WINDOWS) -> list[tuple[float, float]]:
    """The hit rate by the time of submission: (middle of a window, share of its prompt tokens that
    the cache had). Windows without a turn are left out."""
    end_s = max(turn.at_s for turn in turns)
    width_s = max(end_s, 1e-9) / num_windows
    found: list[tuple[float, float]] = []
    for number in range(num_windows):
        inside = [t for t in turns if min(num_windows - 1, int(t.at_s / width_s)) == number]
        prompt_tokens = sum(turn.prompt_tokens for turn in inside)
        if prompt_tokens:
            cached = sum(turn.cached_tokens for turn in inside)
            found.append(((number + 0.5) * width_s, cached / prompt_tokens))
    return found


def plot(turns: Sequence[Turn], path: Path, title: str) -> None:
    """Write a PNG. Raises MissingExtra without matplotlib, RequestInvalid without a turn."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps state for the whole process
    except ImportError as exc:
        raise MissingExtra('--plot needs matplotlib: pip install "agentrt[plot]"') from exc
    if not turns:
        raise RequestInvalid("there is nothing to plot: no turn was completed")
    figure = Figure(figsize=(9, 5), layout="constrained")
    first, hits = figure.subplots(2, 1, sharex=True)
    first.plot(
        [turn.at_s for turn in turns],
        [1000 * turn.ttft_s for turn in turns],
        ".",
        markersize=4,
        alpha=0.6,
        color="#3f74c8",
    )
    first.set(ylabel="time to first token, ms", yscale="log", title=title)
    middles, shares = zip(*windows(turns), strict=True)
    hits.plot(middles, shares, marker=".", color="#2f9e73")
    hits.set(ylabel="prompt tokens from the cache", ylim=(0, 1.02), xlabel="seconds")
    for axes in (first, hits):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as exc:
        raise RequestInvalid(f"the picture {path} cannot be written: {exc}") from exc
