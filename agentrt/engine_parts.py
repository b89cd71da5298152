"""What an open engine is made of, and how it is put together. Loads torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from agentrt.cache import PrefixCache
from agentrt.cache.disk import DiskTier
from agentrt.cache.host import SLAB_BYTES
from agentrt.cache.keys import Fingerprint, chunk_key, root_key
from agentrt.cache.node import TokenArray
from agentrt.cache.tier import Gate
from agentrt.chat import Chat
from agentrt.config import EngineConfig, ResolvedConfig
from agentrt.engine_tiers import (
    CHUNK_TOKENS,
    LRU,
    OpenTiers,
    disk_packing,
    fingerprint_of,
    open_tiers,
)
from agentrt.errors import EngineClosed, ModelNotFound
from agentrt.explain import Elsewhere
from agentrt.loop import Loop
from agentrt.metrics import Stats
from agentrt.models.base import ModelSpec
from agentrt.models.load import LoadedModel, load_model
from agentrt.pauses import Pauses
from agentrt.poster import Sink, poster
from agentrt.precedence import HELD_POOL_SHARE, Precedence
from agentrt.registry import locate
from agentrt.runner import ModelRunner, Runner
from agentrt.scheduler import Scheduler
from agentrt.speculate import Drafter
from agentrt.template import load_template
from agentrt.tokenizer import load_tokenizer
from agentrt.transfer import TransferThread

if TYPE_CHECKING:
    from agentrt.transfer_cuda import PinnedSlabs

EngineProgress = Callable[[str, int, int], None]


@frozen(kw_only=True)
class EngineParts:
    """Everything between `__aenter__` and `aclose`."""

    loop: Loop
    chat: Chat
    spec: ModelSpec
    model_name: str
    kernels: str
    weights: str
    fingerprint: Fingerprint
    disk_problem: str | None = None  # why there is no disk tier, though one was wanted
    disk: DiskTier | None = None

    def elsewhere(self, token_ids: TokenArray) -> Elsewhere | None:
        """Where else the disk tier has these tokens' beginning: what `explain` may have to tell."""
        mover = self.loop.scheduler.mover
        if self.disk is None or mover is None or len(token_ids) < mover.tiers.chunk_tokens:
            return None
        for other in (part.fingerprint for part in self.disk.contents()):
            key = chunk_key(root_key(other), token_ids[: mover.tiers.chunk_tokens])
            if other != self.fingerprint and self.disk.has(key):
                if other.model_digest != self.fingerprint.model_digest:
                    return "new model digest"
                is_ours = other.namespace == self.fingerprint.namespace
                return "new settings or machine" if is_ours else "namespace"
        return None

    def stats(self) -> Stats:
        scheduler, counters = self.loop.scheduler, self.loop.counters
        config, cache, mover = scheduler.config, scheduler.cache.stats(), scheduler.mover
        origins = scheduler.origins
        block_bytes = config.block_tokens * config.kv_token_bytes
        return Stats(
            model=self.model_name,
            kernels=self.kernels,
            weights=self.weights,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=counters.finished,
            cancelled=counters.cancelled,
            preempted=counters.preempted,
            steps=counters.steps,
            prompt_tokens=origins.known,
            cached_tokens=origins.tiers["device"],
            loaded_tokens={tier: origins.tiers[tier] for tier in ("host", "disk")},
            computed_tokens=origins.computed,
            recomputed_tokens=origins.again,
            output_tokens=counters.output_tokens,
            drafted_tokens=0 if scheduler.drafter is None else scheduler.drafter.num_drafted,
            accepted_tokens=0 if scheduler.drafter is None else scheduler.drafter.num_right,
            evicted_tokens=cache.evicted_tokens,
            kv_blocks=config.num_blocks,
            kv_free_blocks=cache.free_blocks,
            kv_bytes=config.num_blocks * block_bytes,
            kv_used_bytes=(config.num_blocks - cache.free_blocks) * block_bytes,
            step_s=counters.step_s,
            forward_s=counters.forward_s,
            last_batch_rows=counters.last_batch_rows,
            fetched_tokens={} if mover is None else dict(mover.fetched_tokens),
            failed_loads=0 if mover is None else mover.failed_loads,
            lower=None if mover is None else mover.tiers.stats(),
            disk_problem=self.disk_problem,
        )


def open_parts(
    model: str,
    config: EngineConfig,
    progress: EngineProgress | None,
    event_loop: asyncio.AbstractEventLoop,
    abandoned: threading.Event,
) -> EngineParts:
    """Find and load. Blocks for seconds: called on the thread that will run the steps."""

    def report(stage: str) -> Callable[[int, int], None]:
        def count(done: int, total: int) -> None:
            if abandoned.is_set():
                raise EngineClosed("opening the engine was cancelled")
            if progress is not None:
                progress(stage, done, total)

        return count

    path = Path(model)
    if not config.random_weights:
        path = locate(model, config.cache_dir, report("fetching"))
    loaded = load_model(path, config, report("loading"))
    resolved = _resolve(config, loaded)
    runner = _runner(loaded, resolved)
    fingerprint = fingerprint_of(config, loaded, resolved.kv_token_bytes)
    precedence = Precedence()
    slabs = _pinned_slabs(loaded.compute.device.type, resolved, precedence)
    loop, tiers = build_loop(
        config,
        resolved,
        fingerprint,
        runner,
        poster(event_loop, gives_way=loaded.compute.device.type == "cpu"),
        precedence,
        device=loaded.compute.device.type,
        packing=disk_packing(config, loaded),
        **({} if slabs is None else {"allocate": slabs.allocate}),
    )
    if slabs is not None:
        loop.at_end.append(slabs.close)
    chat = _chat(path, loaded.model.spec, config)
    report("starting")(1, 1)
    return EngineParts(
        loop=loop,
        chat=chat,
        spec=loaded.model.spec,
        model_name=path.name,
        kernels=loaded.compute.kernels,
        weights=loaded.compute.weights,
        disk_problem=tiers.problem,
        disk=tiers.disk,
        fingerprint=fingerprint,
    )


def build_loop(
    config: EngineConfig,
    resolved: ResolvedConfig,
    fingerprint: Fingerprint,
    runner: Runner,
    post: Callable[[list[tuple[Sink, Any]]], None],
    precedence: Precedence,
    **tiers_options: Any,
) -> tuple[Loop, OpenTiers]:
    """The step loop above every tier, and the tiers.

    `tiers_options` are those of `engine_tiers.open_tiers`.
    """
    is_lru = config.eviction == "lru"
    cache = PrefixCache(resolved.num_blocks, resolved.block_tokens, LRU if is_lru else None)
    # On a CPU copies and steps are long calls that leave the interpreter to others.
    gate = precedence if tiers_options["device"] == "cuda" else None
    tiers = open_tiers(config, resolved, fingerprint, cache, gate=gate, **tiers_options)
    pauses = Pauses(cache, tiers.mover, config.namespace, marks=not is_lru)
    limits = runner.draft_limits if config.speculation else None
    drafter = None if limits is None else Drafter(limits)
    scheduler = Scheduler(resolved, cache, tiers.mover, pauses, drafter)
    loop = Loop(scheduler, runner, post, precedence=precedence)
    if tiers.mover is not None:
        loop.transfers = TransferThread(
            runner.copier(),
            tiers.disk,
            loop.transferred,
            gate=gate,
            most_held_blocks=resolved.num_blocks // HELD_POOL_SHARE,
        )
    return loop, tiers


def _pinned_slabs(device: str, resolved: ResolvedConfig, gate: Gate) -> PinnedSlabs | None:
    """Page-locked memory for the host tier of a GPU."""
    if device != "cuda":
        return None
    from agentrt.transfer_cuda import PinnedSlabs

    slot_bytes = CHUNK_TOKENS * resolved.kv_token_bytes
    slab_bytes = max(1, SLAB_BYTES // slot_bytes) * slot_bytes
    slabs = PinnedSlabs(slab_bytes, resolved.host_kv_bytes, gate)
    slabs.make_ahead()
    return slabs


def _runner(loaded: LoadedModel, resolved: ResolvedConfig) -> Runner:
    if loaded.compute.ops.name != "triton":
        return ModelRunner(loaded.model, loaded.compute, resolved)
    from agentrt.cuda_runner import CudaRunner  # loads Triton, which the CPU path does without

    return CudaRunner.open(loaded.model, loaded.compute, resolved)


def _resolve(config: EngineConfig, loaded: LoadedModel) -> ResolvedConfig:
    spec, compute = loaded.model.spec, loaded.compute
    return config.resolve(
        device=compute.device.type,
        kv_token_bytes=spec.kv_values_per_token * compute.dtype.itemsize,
        model_context_tokens=spec.max_context_tokens,
        free_device_bytes=compute.free_device_bytes(),
    )


def _chat(path: Path, spec: ModelSpec, config: EngineConfig) -> Chat:
    """The text side; a folder that holds no tokenizer serves token ids alone."""
    if config.random_weights:
        return Chat(None, None, spec.vocab_size, spec.eos_token_ids)
    try:
        tokenizer = load_tokenizer(path)
    except ModelNotFound:
        return Chat(None, None, spec.vocab_size, spec.eos_token_ids)
    eos = tokenizer.eos_token_ids | spec.eos_token_ids
    return Chat(tokenizer, load_template(path), spec.vocab_size, eos, config.tool_format)
