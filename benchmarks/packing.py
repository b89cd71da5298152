"""What `disk_kv_dtype="int8"` does to a model's next token, and how many bytes it saves.

    python benchmarks/packing.py [--texts 12]

Prefixes of this repository's README and CHANGELOG are computed, kept on disk, and read back by a
new engine. Printed is how much of the next token's probability has moved (the total variation over
its 50 best) against the engine which had computed the prefix: once for KV kept as it is, once for
int8.
"""

import argparse
import asyncio
import math
import tempfile
from pathlib import Path
from statistics import mean

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.config import default_cache_dir
from agentrt.registry import locate
from agentrt.types import Completion

ROOT = Path(__file__).parents[1]
SHORTEST, LONGER = 1500, 200  # characters of the first text, and what each next one has more
OPTIONS = GenerateOptions(max_tokens=1, top_logprobs=50, ignore_eos=True)


async def next_tokens(config: EngineConfig, texts: list[str]) -> tuple[list[Completion], int]:
    """The completions, and the bytes that lie on disk when the engine is closed."""
    async with Engine(str(locate("smollm2-135m", default_cache_dir())), config) as engine:
        done = [await engine.generate(text, OPTIONS) for text in texts]
    size = sum(path.stat().st_size for path in config.cache_dir.rglob("payload.kv"))
    return done, size


def moved(before: Completion, after: Completion) -> float:
    """Total variation over the tokens that `before` lists; one that `after` lacks went to zero."""
    assert before.logprobs is not None
    assert after.logprobs is not None
    other = dict(after.logprobs[0].top)
    pairs = [(old, other.get(token, -math.inf)) for token, old in before.logprobs[0].top]
    return sum(abs(math.exp(old) - math.exp(new)) for old, new in pairs) / 2


async def measure(num_texts: int) -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    lengths = [SHORTEST + LONGER * i for i in range(num_texts)]
    texts = [text[2 * length : 3 * length] for length in lengths]
    for dtype in ("same", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            config = EngineConfig(
                cache_dir=Path(folder), disk_kv_bytes=2 << 30, disk_kv_dtype=dtype
            )
            before, _ = await next_tokens(config, texts)
            after, num_bytes = await next_tokens(config, texts)
        found = sum(done.usage.cached_tokens["disk"] for done in after)
        shares = [moved(*pair) for pair in zip(before, after, strict=True)]
        print(
            f"{dtype}: {num_bytes / 2**20:.0f} MiB on disk, {found:,} tokens from there; moved "
            f"{mean(shares):.2%} on average, {max(shares):.2%} at most"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=12)
    asyncio.run(measure(parser.parse_args().texts))


if __name__ == "__main__":
    main()
