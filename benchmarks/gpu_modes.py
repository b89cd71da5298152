"""What a mode of a GPU engine costs or saves: decode, first token, and how far its logits are.

    python benchmarks/gpu_modes.py SHAPE --shared DIR [--modes MODE ...] [--out FILE]

The measurement of `gpu_decode.py`, for one mode after the other in one run: milliseconds a token at
batch 1 and 8 after 1,024 tokens, and to the first token of 2,048 and 16,384 new ones. The distance
is that of log-probabilities to the default's, over all tokens that both have among their first 20,
as a mean over PROMPTS prompts of random tokens; the weights are random too. Nothing is guessed, so
that every step is one of the mode's own.
"""

import asyncio
import random
import statistics
from typing import Any

from gpu_decode import decode_ms, first_token_ms, options, parser_of, report, subject, tokens

from agentrt import Engine, EngineConfig, GenerateOptions

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "deterministic": {"deterministic": True},
    "fp8": {"weights": "fp8"},
    "fp8 kv": {"kv_dtype": "fp8"},
    "persistent": {"decode_launch": "persistent"},
}
PROMPTS = 8
NUM_TOP = 20
Top = dict[int, float]


async def top_logprobs(engine: Engine) -> list[Top]:
    """Of the first token after each prompt."""
    rng = random.Random(7)
    wanted = GenerateOptions(max_tokens=1, temperature=0.0, ignore_eos=True, top_logprobs=NUM_TOP)
    found = []
    for _ in range(PROMPTS):
        done = await engine.generate(tokens(rng, 300), wanted)
        assert done.logprobs is not None
        found.append(dict(done.logprobs[0].top))
    return found


def distance(some: list[Top], others: list[Top]) -> float:
    """Mean difference of the log-probabilities that both have."""
    return statistics.mean(
        abs(one[token] - other[token])
        for one, other in zip(some, others, strict=True)
        for token in one.keys() & other.keys()
    )


async def measure(model: str, settings: dict[str, Any]) -> tuple[dict[str, float], list[Top]]:
    config = EngineConfig(**{"speculation": False, **settings})
    rng = random.Random(0)
    async with Engine(model, config) as engine:
        await engine.generate(tokens(rng, 64), options(8))
        found = {f"decode {batch}": await decode_ms(engine, rng, batch, 1024) for batch in (1, 8)}
        for num in (2048, 16384):
            times = [await first_token_ms(engine, tokens(rng, num)) for _ in range(3)]
            found[f"first of {num}"] = statistics.median(times)
        return {name: round(ms, 3) for name, ms in found.items()}, await top_logprobs(engine)


async def all_modes(model: str, given: dict[str, Any], modes: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    expected: list[Top] | None = None
    for mode in modes:
        times, top = await measure(model, {**given, **MODES[mode]})
        expected = expected or top
        result[mode] = {**times, "distance": round(distance(top, expected), 4)}
        print(f"{mode}: {result[mode]}", flush=True)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--modes", nargs="*", default=["default", "deterministic", "fp8"])
    arguments = parser.parse_args()
    model, _, given = subject(arguments)
    report(arguments, {"modes": asyncio.run(all_modes(model, given, arguments.modes))})


if __name__ == "__main__":
    main()
