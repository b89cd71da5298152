"""The whole airline workload: every turn is served, and no prompt token is computed twice.

    python benchmarks/replay_all.py --shared DIR [--agents 100] [--concurrency 32] [--model NAME]

Counts only, which do not depend on the model's size: by default a tiny shape with random weights
runs it in a minute or two. The least that can be computed is the new tokens of the workload, less
what agents share: each agent's log is compared with those before it. An agent's output is new in
one respect: its last token was sampled, and is computed with the next turn's.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from cpu_agents import MAX_CONTEXT, load_replay

from agentrt import Engine, EngineConfig, GenerateOptions

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
KV_BYTES = 4 << 30


def num_shared_tokens(prompts: list[list[int]]) -> int:
    """Tokens of first prompts that stand at the beginning of an earlier one too."""
    total, trie = 0, {}
    for prompt in prompts:
        node, shared = trie, 0
        for token in prompt:
            shared += token in node
            node = node.setdefault(token, {})
        total += shared
    return total


async def run(arguments: argparse.Namespace, model: str, config: EngineConfig) -> dict[str, Any]:
    replay = load_replay(arguments.shared)
    trace = arguments.shared / "traces" / "tau_airline_tokens.jsonl.gz"
    rows = replay.load(trace, arguments.agents)
    async with Engine(model, config) as engine:

        async def one(_: str, ids: list[int], num_tokens: int) -> tuple[float, list[int]]:
            options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
            done = await engine.generate(ids, options)
            return done.usage.ttft_s, list(done.token_ids)

        report = await replay.replay(
            rows, one, concurrency=arguments.concurrency, wait_scale=0.0, max_context=MAX_CONTEXT
        )
        await engine.check()
        stats = engine.stats()
    shared = num_shared_tokens([row["segments"][0][1] for row in rows])
    new = report.summary()["new_tokens"] - shared
    computed = stats.computed_tokens + stats.recomputed_tokens
    return {
        "turns": len(report.turns),
        "wall_s": round(report.wall_s, 1),
        "new_tokens": new,
        "computed_tokens": computed,
        "ratio": round(computed / new, 4),
        "preempted": stats.preempted,
        "evicted_tokens": stats.evicted_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        config = EngineConfig(
            random_weights=arguments.model is None, device_kv_bytes=KV_BYTES, disk_kv_bytes=0
        )
        print(json.dumps(asyncio.run(run(arguments, arguments.model or folder, config))))


if __name__ == "__main__":
    main()
