"""The tables of agentrt/workload.py, from the traces that they name.

python benchmarks/workload_shapes.py --shared DIR

A conversation of Mooncake's is a row of requests, each of which begins with all blocks of an
earlier one but its last, which is cut off somewhere: two at least, since nearly every prompt begins
with the same one. Its later turns read what their prompt has more than the last prompt and output
together; where a prompt is shorter than these, as in one turn of eight, nothing is known of that.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from attrs import asdict

from agentrt.workload import SHAPES, SHARES

BLOCK_TOKENS = 512  # of Mooncake's hashes
LEAST_BLOCKS = 2
LONG_TOKENS = 8192  # a prompt to be summarised
LONG_TURNS = 3  # a conversation that may be an agent's
Facts = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="has traces/")
    for name, facts in derived(parser.parse_args().shared / "traces").items():
        known = asdict(SHAPES[name])
        differ = [key for key, value in facts.items() if known[key] != value]
        print(name, "as in the code" if not differ else f"differs in {', '.join(differ)}")
        for key, value in facts.items():
            print(f"  {key} = {value}")


def derived(folder: Path) -> dict[str, Facts]:
    """Each shape's numbers by its name."""
    requests = list(_lines(folder / "mooncake_conversation.jsonl.gz"))
    seconds = requests[-1]["timestamp"] / 1000
    talks = conversations(requests)
    return {
        "chat": _talked(talks, seconds),
        "coding": _talked([each for each in talks if len(each) >= LONG_TURNS], seconds),
        "summarise": _talked(
            [each for each in talks if len(each) == 1 and each[0]["input_length"] >= LONG_TOKENS],
            seconds,
        ),
        "agent": _tokens(list(_lines(folder / "tau_airline_tokens.jsonl.gz"))),
    }


def conversations(requests: Iterable[Facts]) -> list[list[Facts]]:
    """Requests, in the order of their times, as conversations."""
    begun: dict[tuple[int, ...], list[Facts]] = {}
    found: list[list[Facts]] = []
    for request in requests:
        blocks = tuple(request["hash_ids"])
        lengths = range(len(blocks), LEAST_BLOCKS - 1, -1)
        talk = next((begun[blocks[:n]] for n in lengths if blocks[:n] in begun), None)
        if talk is None:
            found.append(talk := [])
        talk.append(request)
        if len(blocks) > LEAST_BLOCKS:
            begun[blocks[:-1]] = talk
    return found


def _talked(talks: Sequence[Sequence[Facts]], seconds: float) -> Facts:
    follow = [pair for talk in talks for pair in pairwise(talk)]
    more = [
        after["input_length"] - before["input_length"] - before["output_length"]
        for before, after in follow
    ]
    return {
        "agents_per_s": float(f"{len(talks) / seconds:.3g}"),
        "shared_tokens": BLOCK_TOKENS,
        "turns": quantiles(len(talk) for talk in talks),
        "first_tokens": quantiles(talk[0]["input_length"] - BLOCK_TOKENS for talk in talks),
        "later_tokens": quantiles(tokens for tokens in more if tokens > 0),
        "output_tokens": quantiles(each["output_length"] for talk in talks for each in talk),
        "wait_s": quantiles(
            round((after["timestamp"] - before["timestamp"]) / 1000) for before, after in follow
        ),
    }


def _tokens(agents: Sequence[Facts]) -> Facts:
    """Of agents as segments: what each reads ("in") or writes ("out"), and how long it waits."""
    firsts = [agent["segments"][0][1] for agent in agents]
    num_shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*firsts)))  # noqa: B905
    segments = [agent["segments"] for agent in agents]
    outs = [[each for each in row if each[0] == "out"] for row in segments]
    return {
        "shared_tokens": num_shared,
        "turns": quantiles(map(len, outs)),
        "first_tokens": quantiles(len(first) - num_shared for first in firsts),
        "later_tokens": quantiles(len(s[1]) for row in segments for s in row[1:] if s[0] == "in"),
        "output_tokens": quantiles(len(each[1]) for row in outs for each in row),
        "wait_s": quantiles(each[2] for row in outs for each in row[:-1]),
    }


def quantiles(values: Iterable[float]) -> tuple[float, ...]:
    """The values at the shares of a shape's list; none are all 0."""
    ordered = sorted(values) or [0]
    return tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in SHARES)


def _lines(path: Path) -> Iterable[Facts]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    main()
