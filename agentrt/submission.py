"""What is decided about a request before it is queued."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from attrs import evolve

from agentrt.config import ResolvedConfig
from agentrt.errors import Overloaded, PromptTooLong
from agentrt.structured import OutputForm, output_form, refuse_two_grammars
from agentrt.types import GenerateOptions


def packed(token_ids: Any) -> Any:
    """A list of ids as an array of int32, where it is one of nothing but int; whatever else comes
    back as it is, for those who check it. Of 16,384 ids numpy makes an array in 0.5 ms, and this
    way it takes 0.15: while a caller waits for a first token."""
    if not isinstance(token_ids, list | tuple) or not token_ids or type(token_ids[0]) is not int:
        return token_ids
    try:
        return np.frombuffer(struct.pack(f"{len(token_ids)}i", *token_ids), dtype=np.int32)
    except (struct.error, TypeError, OverflowError):
        return token_ids


def admissible_tokens(
    num_prompt_tokens: int, options: GenerateOptions, resolved: ResolvedConfig, *, num_queued: int
) -> int:
    """Prompt plus output, within the context; raises where it can never be served."""
    context = resolved.max_context_tokens
    if num_prompt_tokens >= context:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens, the context holds {context} with at "
            "least one of output: shorten it, or raise max_context_tokens if the model allows"
        )
    total_tokens = min(num_prompt_tokens + options.max_tokens, context)
    most = resolved.pool_tokens - resolved.block_tokens  # a copied partial block needs a spare
    if total_tokens > most:
        need = (total_tokens + resolved.block_tokens) * resolved.kv_token_bytes
        raise PromptTooLong(
            f"prompt and output take {total_tokens} tokens, the KV pool serves {most}: lower "
            f"max_tokens, or raise device_kv_bytes to {need}"
        )
    if num_queued >= resolved.max_waiting + resolved.max_batch:
        raise Overloaded(
            f"{num_queued} requests are queued: wait, or raise max_waiting ({resolved.max_waiting})"
        )
    return total_tokens


def held_to(options: GenerateOptions, output: Any) -> tuple[GenerateOptions, OutputForm | None]:
    """The options with the grammar of what `output` asks for, and its form."""
    if output is None:
        return options, None
    refuse_two_grammars(options, output)
    form = output_form(output)
    return evolve(options, grammar=form.grammar), form


def samples(options: GenerateOptions) -> list[GenerateOptions]:
    """One set of options a sample."""
    seeds = [None if options.seed is None else options.seed + i for i in range(options.n)]
    return [evolve(options, n=1, seed=seed) for seed in seeds]
