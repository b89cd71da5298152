"""Prompts from real conversations: greedy tokens and logits against transformers, in float32.

    python benchmarks/parity.py --shared DIR [--prompts 50] [--tokens 64]   (needs `accelerate`)

Each prompt (64 to 6,000 tokens of the airline conversations) is continued greedily by agentrt;
transformers then reads prompt and continuation in one forward. Every token must be its argmax too,
except where its two best logits lie within 1e-4.
"""

import argparse
import asyncio
import gzip
import json
import random
import time
from pathlib import Path

import torch
import transformers

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.config import default_cache_dir
from agentrt.registry import locate

TIE = 1e-4
Row = list[tuple[int, float]]  # tokens and their log-probabilities
CONFIG = EngineConfig(device="cpu", dtype="float32", max_batch=4, disk_kv_bytes=0)


def prompts(shared: Path, count: int) -> list[list[int]]:
    """`count` prompts of lengths spread evenly (in the logarithm) over 64 .. 6,000 tokens."""
    with gzip.open(shared / "traces" / "tau_airline_tokens.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    logs = [[i for _, ids, _ in row["segments"] for i in ids] for row in rows]
    chosen = []
    for index in range(count):
        length = round(64 * (6000 / 64) ** (index / max(count - 1, 1)))
        fitting = [log for log in logs if len(log) >= length]
        chosen.append(random.Random(index).choice(fitting)[:length])
    return chosen


async def continuations(
    given: list[list[int]], num_tokens: int, config: EngineConfig = CONFIG
) -> list[Row]:
    """agentrt's (token, logprob)s, all prompts in one engine."""
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True, top_logprobs=0)
    async with Engine(config=config) as engine:
        done = await asyncio.gather(*(engine.generate(prompt, options) for prompt in given))
    return [[(one.token_id, one.logprob) for one in c.logprobs or ()] for c in done]


def peer(dtype: torch.dtype, device: str) -> transformers.PreTrainedModel:
    """The same weights in transformers."""
    path = locate("smollm2-135m", default_cache_dir())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype
    )
    return model.to(device)


def compare(
    model: transformers.PreTrainedModel, prompt: list[int], got: Row
) -> tuple[int, int, float]:
    """(tokens that differ, of those near-ties, largest error of a log-probability)."""
    ids = torch.tensor([prompt + [token for token, _ in got]], device=model.device)
    with torch.inference_mode():
        logits = model(ids[:, :-1], logits_to_keep=len(got)).logits[0].float()
    logprobs = logits.log_softmax(-1)
    differ = ties = 0
    error = 0.0
    for row, (token, logprob) in zip(logprobs, got, strict=True):
        error = max(error, abs(float(row[token]) - logprob))
        best = row.topk(2).values
        if int(row.argmax()) != token:
            differ += 1
            ties += bool(best[0] - best[1] < TIE)
    return differ, ties, error


def arguments_of(doc: str) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of(__doc__)
    given = prompts(arguments.shared, arguments.prompts)
    begin = time.perf_counter()
    got = asyncio.run(continuations(given, arguments.tokens))
    print(f"agentrt: {time.perf_counter() - begin:.0f} s for {len(given)} prompts", flush=True)
    model = peer(torch.float32, "cpu")
    rows = [compare(model, prompt, out) for prompt, out in zip(given, got, strict=True)]
    differ, ties = sum(row[0] for row in rows), sum(row[1] for row in rows)
    lengths = f"{len(given[0])} to {len(given[-1])}"
    print(f"{len(given)} prompts of {lengths} tokens, {arguments.tokens} tokens each")
    error = max(row[2] for row in rows)
    print(f"tokens that differ: {differ} (near-ties: {ties}); largest error {error:.1e}")
    raise SystemExit(differ > ties)


if __name__ == "__main__":
    main()
