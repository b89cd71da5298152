"""Shapes of workloads: how agents arrive, what they read and write, and how long they wait.

The built-in ones are quantiles of two public traces, and name them. Mooncake's has lengths, times
and block hashes of production requests, no text; a request there continues the earlier one whose
blocks its prompt begins with. No trace of coding agents was at hand: `coding` is the nearest part.
`benchmarks/workload_shapes.py` makes the tables anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import asdict, field, fields_dict, frozen

from agentrt.cli_workload import AgentRow, Segment
from agentrt.errors import RequestInvalid

# Each list of a shape is the values at these shares of the trace's, smallest first.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_MOONCAKE = "Mooncake FAST'25 conversation trace, first half: 6,015 requests in 1,881 s; Apache-2.0"
_TAU = "tau-bench airline, gpt-4o, 100 conversations as SmolLM2 tokens; MIT; waits are drawn"


def _quantiles(values: Any) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if len(numbers) != len(SHARES) or any(b < a for a, b in pairwise(numbers)) or numbers[0] < 0:
        raise RequestInvalid(
            f"a shape's list has {len(SHARES)} numbers of at least 0, smallest first: the values "
            f"at the shares {SHARES}; got {list(numbers)}"
        )
    return numbers


@frozen(kw_only=True)
class Shape:
    """A workload's distributions. `shared_tokens` begin every agent's first prompt."""

    name: str
    source: str
    agents_per_s: float
    shared_tokens: int
    turns: tuple[float, ...] = field(converter=_quantiles)
    first_tokens: tuple[float, ...] = field(converter=_quantiles)  # beyond the shared ones
    later_tokens: tuple[float, ...] = field(converter=_quantiles)
    output_tokens: tuple[float, ...] = field(converter=_quantiles)
    wait_s: tuple[float, ...] = field(converter=_quantiles)


_NONE = (0,) * len(SHARES)
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape(
                name="chat",
                source=f"{_MOONCAKE}; all 4,193 conversations",
                agents_per_s=2.23,
                shared_tokens=512,
                turns=(1, 1, 1, 1, 1, 2, 3, 6, 26),
                first_tokens=(379, 396, 1044, 6054, 14672, 27249, 40543, 90248, 122377),
                later_tokens=(1, 8, 12, 34, 552, 4687, 8084, 19592, 91467),
                output_tokens=(1, 24, 153, 356, 478, 609, 708, 1137, 2000),
                wait_s=(3, 39, 66, 120, 255, 426, 552, 834, 1533),
            ),
            Shape(
                name="coding",
                source=f"{_MOONCAKE}; its 371 conversations of 3 turns or more",
                agents_per_s=0.197,
                shared_tokens=512,
                turns=(3, 3, 3, 3, 5, 6, 8, 12, 26),
                first_tokens=(525, 829, 1894, 6383, 15375, 27527, 44036, 98300, 120124),
                later_tokens=(1, 7, 11, 25, 127, 1424, 4245, 17091, 41611),
                output_tokens=(1, 32, 145, 370, 517, 661, 773, 1848, 2000),
                wait_s=(3, 36, 63, 114, 228, 396, 498, 639, 927),
            ),
            Shape(
                name="summarise",
                source=f"{_MOONCAKE}; its 1,435 prompts of 8,192 tokens or more, one turn each",
                agents_per_s=0.763,
                shared_tokens=512,
                turns=(1,) * len(SHARES),
                first_tokens=(7696, 9003, 11357, 16193, 25841, 45112, 69133, 111093, 122254),
                later_tokens=_NONE,
                output_tokens=(1, 17, 172, 360, 463, 571, 676, 1045, 2000),
                wait_s=_NONE,
            ),
            Shape(
                name="agent",
                source=_TAU,
                agents_per_s=1.0,  # the trace says nothing of it
                shared_tokens=1346,
                turns=(4, 5, 7, 12, 16, 20, 23, 30, 30),
                first_tokens=(15, 19, 21, 26, 34, 45, 47, 54, 55),
                later_tokens=(10, 18, 29, 43, 330, 405, 465, 1236, 3047),
                output_tokens=(11, 34, 40, 52, 89, 165, 221, 321, 544),
                wait_s=(0, 0, 0, 0, 0.488, 1.062, 1.603, 3.175, 8),
            ),
        )
    }
)


def find_shape(name: str) -> Shape:
    """A built-in shape, or that of a JSON file with a Shape's fields. Raises RequestInvalid."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        facts = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RequestInvalid(
            f"the shape {name} is none of {', '.join(SHAPES)}, and no JSON file: {exc}"
        ) from exc
    wanted = set(fields_dict(Shape))
    if not isinstance(facts, dict) or set(facts) != wanted:
        raise RequestInvalid(f"the shape {name} must have the fields {', '.join(sorted(wanted))}")
    try:
        return Shape(**facts)
    except (TypeError, ValueError) as exc:
        raise RequestInvalid(f"the shape {name}: {exc}") from exc


def shape_json(shape: Shape) -> str:
    """A shape as a file that `find_shape` reads."""
    return json.dumps(asdict(shape), indent=1)


def value_at(quantiles: Sequence[float], share: float) -> float:
    """The value below which that share lies, between two known ones on a straight line."""
    for (low, high), (a, b) in zip(pairwise(SHARES), pairwise(quantiles), strict=True):
        if share <= high:
            return a + (b - a) * (share - low) / (high - low)
    return quantiles[-1]


@frozen(kw_only=True)
class Sampling:
    """How a shape becomes agents. `tokens_scale` and `time_scale` make all lengths and all waits
    smaller, so that a small model has the shape of a large one's work."""

    num_agents: int
    vocab_size: int
    seed: int = 0
    agents_per_s: float | None = None  # None: the shape's own
    tokens_scale: float = 1.0
    time_scale: float = 1.0


def sample(shape: Shape, sampling: Sampling) -> Iterator[AgentRow]:
    """Agents of that shape, the same ones for the same seed. They arrive as a Poisson process."""
    rate = (sampling.agents_per_s or shape.agents_per_s) / sampling.time_scale
    if rate <= 0 or sampling.tokens_scale <= 0 or sampling.num_agents < 1:
        raise RequestInvalid("agents, their rate and the scales must be above 0")
    rng = random.Random(f"{shape.name} {sampling.seed}")
    words = random.Random(f"tokens {sampling.seed}")  # so that scales change no other draw
    shared = _ids(words, shape.shared_tokens * sampling.tokens_scale, sampling.vocab_size)
    arrival_s = 0.0
    for number in range(sampling.num_agents):
        segments = tuple(_segments(shape, sampling, rng, words, shared))
        yield AgentRow(f"{shape.name} {number + 1}", segments, arrival_s)
        arrival_s += rng.expovariate(rate)


def _segments(
    shape: Shape,
    sampling: Sampling,
    rng: random.Random,
    words: random.Random,
    shared: tuple[int, ...],
) -> Iterator[Segment]:
    scale, vocab_size = sampling.tokens_scale, sampling.vocab_size
    num_turns = max(1, round(value_at(shape.turns, rng.random())))
    for turn in range(num_turns):
        quantiles = shape.later_tokens if turn else shape.first_tokens
        ids = _ids(words, value_at(quantiles, rng.random()) * scale, vocab_size)
        yield Segment("in", ids if turn else shared + ids, 0.0)
        num_output = max(1, round(value_at(shape.output_tokens, rng.random()) * scale))
        wait_s = value_at(shape.wait_s, rng.random()) * sampling.time_scale
        is_last = turn + 1 == num_turns
        yield Segment("out", (0,) * num_output, 0.0 if is_last else wait_s)


def _ids(words: random.Random, num_tokens: float, vocab_size: int) -> tuple[int, ...]:
    return tuple(words.choices(range(vocab_size), k=max(1, round(num_tokens))))
