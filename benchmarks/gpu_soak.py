"""Random requests on a GPU for many steps: what graphs compute against what eager kernels do.

    python benchmarks/gpu_soak.py [--steps 10000] [--max-batch 48] [--seed 0]

A small model with random weights and deterministic=True. Requests come and go at random, so that
the batch changes at nearly every step; some share prefixes, some are cancelled, some are drawn with
a temperature, and the pool is so small that requests are preempted. Every sixteenth greedy request
is then computed alone, kernel by kernel, without graphs and cache, and must have the same tokens,
one for one. Ends with status 1 if one differs, or if the books do not add up.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from attrs import define, field

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.kernels import Segment
from agentrt.models.load import load_model

SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
POOL_TOKENS = 12_000
BLOCK_TOKENS = 64
CHECKED_EVERY = 16


@define
class Soak:
    """Keeps `most` requests alive until the engine has made `steps` steps."""

    engine: Engine
    rng: random.Random
    steps: int
    most: int
    kept: list[tuple[list[int], tuple[int, ...]]] = field(factory=list)
    num_done: int = 0
    num_cancelled: int = 0
    prefixes: list[list[int]] = field(factory=list)

    def prompt(self) -> list[int]:
        shared = self.rng.choice([[], *self.prefixes[-8:]])
        cut = self.rng.randrange(len(shared) + 1)
        own = [self.rng.randrange(4096) for _ in range(self.rng.randrange(1, 700))]
        prompt = [*shared[:cut], *own]
        self.prefixes.append(prompt[:600])
        return prompt

    async def one(self) -> None:
        """One request, to its end or not."""
        prompt, is_drawn = self.prompt(), self.rng.random() < 0.2
        options = GenerateOptions(
            max_tokens=self.rng.randrange(1, 90),
            ignore_eos=True,
            temperature=0.8 if is_drawn else 0.0,
            seed=self.rng.randrange(1 << 30),
        )
        if self.rng.random() < 0.1:
            async for _ in self.engine.stream(prompt, options):
                if self.rng.random() < 0.1:
                    self.num_cancelled += 1
                    break
            return
        done = await self.engine.generate(prompt, options)
        self.num_done += 1
        if not is_drawn and self.num_done % CHECKED_EVERY == 0:
            self.kept.append((prompt, done.token_ids))

    async def keep_busy(self) -> None:
        """Requests one after the other, with pauses in between."""
        while self.engine.stats().steps < self.steps:
            await self.one()
            await asyncio.sleep(self.rng.random() * 0.05)

    async def run(self) -> None:
        await asyncio.gather(*(self.keep_busy() for _ in range(self.most)))


class Eager:
    """The same model without an engine: one request at a time, kernel by kernel."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.model = load_model(folder, config).model
        spec = self.model.spec
        blocks = spec.max_context_tokens // BLOCK_TOKENS
        shape = (spec.num_layers, 2, blocks, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
        self.kv = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        self.blocks = tuple(range(blocks))

    @torch.inference_mode()
    def tokens(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        found, start, new = [], 0, prompt
        for _ in range(num_tokens):
            ids = torch.tensor(new, device="cuda")
            positions = torch.arange(start, start + len(new), device="cuda")
            segments = (Segment(0, len(new), start, self.blocks),)
            last = torch.tensor([len(new) - 1], device="cuda")
            logits = self.model.forward(ids, positions, segments, self.kv, last)
            start += len(new)
            new = [int(logits[0].argmax())]
            found += new
        return tuple(found)


async def soak(folder: Path, arguments: argparse.Namespace, config: EngineConfig) -> Soak:
    begin = time.perf_counter()
    async with Engine(folder, config) as engine:
        work = Soak(engine, random.Random(arguments.seed), arguments.steps, arguments.max_batch)
        await work.run()
        await engine.check()
        stats = engine.stats()
    print(
        f"{stats.steps} steps in {time.perf_counter() - begin:.0f} s, {work.num_done} requests "
        f"done, {work.num_cancelled} cancelled, {stats.preempted} preempted"
    )
    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--max-batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        token_bytes = 2 * 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 64
        config = EngineConfig(
            device="cuda",
            random_weights=True,
            deterministic=True,
            max_batch=arguments.max_batch,
            block_tokens=BLOCK_TOKENS,
            step_tokens=512,
            device_kv_bytes=POOL_TOKENS * token_bytes,
            host_kv_bytes=0,
            disk_kv_bytes=0,
        )
        work = asyncio.run(soak(folder, arguments, config))
        eager = Eager(folder, config)
        wrong = sum(eager.tokens(prompt, len(out)) != out for prompt, out in work.kept)
    print(f"{len(work.kept)} requests computed again without graphs: {wrong} differ")
    return 1 if wrong or not work.kept else 0


if __name__ == "__main__":
    sys.exit(main())
