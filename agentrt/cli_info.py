"""The command `info`: what a model is, how it will run, and what memory it takes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from agentrt.cli_engine import add_command, add_random_weights, open_engine
from agentrt.config import free_memory_bytes

if TYPE_CHECKING:
    from agentrt.cli_engine import Commands
    from agentrt.engine import Engine


def add_info_parser(commands: Commands) -> None:
    """`info`."""
    text = "load a model and say what it is, how it runs, and what memory it takes"
    add_random_weights(add_command(commands, "info", text, _info))


async def _info(arguments: argparse.Namespace) -> None:
    async with open_engine(arguments) as engine:
        lines = _lines(engine)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _lines(engine: Engine) -> list[tuple[str, str]]:
    stats, resolved, spec = engine.stats(), engine.resolved, engine._open.spec
    architecture = (
        f"{spec.model_type}: {spec.num_layers} layers, hidden {spec.hidden_size}, "
        f"{spec.num_heads} heads of {spec.head_dim} ({spec.num_kv_heads} KV), "
        f"vocabulary {spec.vocab_size:,}"
    )
    pool = (
        f"{stats.kv_blocks:,} blocks of {resolved.block_tokens} tokens = "
        f"{resolved.pool_tokens:,} tokens, {_mebibytes(stats.kv_bytes)} "
        f"({resolved.kv_token_bytes:,} bytes a token)"
    )
    return [
        ("model", stats.model),
        ("architecture", architecture),
        ("weights", stats.weights),
        ("kernels", stats.kernels),
        ("context", f"{resolved.max_context_tokens:,} tokens (model: {spec.max_context_tokens:,})"),
        ("KV pool", pool),
        ("batch", f"{resolved.max_batch} requests, {resolved.step_tokens} tokens a step"),
        ("free memory", _mebibytes(free_memory_bytes())),
        ("cache folder", str(engine.config.cache_dir)),
    ]


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
