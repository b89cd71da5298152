"""How the tiers below the device are opened for an engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs import frozen

from agentrt.cache.chunk import ChunkIndex
from agentrt.cache.disk import DiskTier, Victims
from agentrt.cache.disk_writer import MIN_QUOTA_BYTES
from agentrt.cache.evict import TierRates
from agentrt.cache.host import HostTier, allocate_pages
from agentrt.cache.keys import Fingerprint, root_key
from agentrt.cache.lower import LowerTiers
from agentrt.cache.packing import FloatName, Int8Packing
from agentrt.cache.split import Rates
from agentrt.cache.tier import Gate
from agentrt.errors import ConfigError, TierUnavailable
from agentrt.kernels.arithmetic import arithmetic_of
from agentrt.mover import Mover

if TYPE_CHECKING:
    from agentrt.cache import PrefixCache
    from agentrt.config import EngineConfig, ResolvedConfig
    from agentrt.models.load import LoadedModel

logger = logging.getLogger("agentrt")

CHUNK_TOKENS = 64
MOST_STAGING_BYTES = 1 << 30  # of the way station to the disk, where there is no host tier
PREFILL_S_PER_TOKEN = {"cpu": 1e-3, "cuda": 2e-5}  # until the first prefill is measured
LRU = TierRates(predicts=False)
STORE_FOLDER = "kv"


@frozen
class OpenTiers:
    """What is below the device; `problem` says why there is no disk tier though one was wanted."""

    mover: Mover | None
    disk: DiskTier | None
    problem: str | None


def open_tiers(
    config: EngineConfig,
    resolved: ResolvedConfig,
    fingerprint: Fingerprint,
    cache: PrefixCache,
    *,
    device: str,
    chunk_tokens: int = CHUNK_TOKENS,
    allocate: Callable[[int], Any] = allocate_pages,
    packing: Int8Packing | None = None,
    gate: Gate | None = None,
) -> OpenTiers:
    """Open the tiers that the config asks for. A disk tier that cannot be had is said once, in the
    log, and the engine runs on without it. The disk tier's writer waits at the `gate`."""
    if not resolved.host_kv_bytes and not resolved.disk_kv_bytes:
        return OpenTiers(None, None, None)
    disk, problem = None, None
    owner: list[LowerTiers] = []  # of the disk tier, which is opened first
    if resolved.disk_kv_bytes:
        try:
            disk = _open_disk(
                config, resolved, fingerprint, lambda size: owner[0].victims(size), packing, gate
            )
        except TierUnavailable as exc:
            problem = str(exc)
            logger.warning("running without the disk tier: %s", problem)
    slot_bytes = chunk_tokens * resolved.kv_token_bytes
    host_bytes = resolved.host_kv_bytes
    if disk is not None and host_bytes < slot_bytes:
        staging = resolved.max_context_tokens * resolved.kv_token_bytes + slot_bytes
        host_bytes = min(staging, MOST_STAGING_BYTES)
    if host_bytes < slot_bytes:
        return OpenTiers(None, None, problem)
    token_bytes = resolved.kv_token_bytes
    tiers = LowerTiers(
        ChunkIndex(root_key(fingerprint), chunk_tokens),
        HostTier(host_bytes, slot_bytes, allocate),
        disk,
        token_bytes=token_bytes,
        keeps_host=resolved.host_kv_bytes >= slot_bytes,
        clock=time.monotonic,
        wall_clock=time.time,
        host_rates=LRU if config.eviction == "lru" else TierRates(),
    )
    mover = Mover(
        cache,
        tiers,
        Rates(PREFILL_S_PER_TOKEN[device]),
        overlaps=device == "cuda",
        namespace=config.namespace,
        demotes=disk is None and device == "cpu" and config.eviction == "worth",
    )
    if mover.demotes:
        cache.on_evict(mover.evicted)
    owner.append(tiers)
    return OpenTiers(mover, disk, problem)


def fingerprint_of(config: EngineConfig, loaded: LoadedModel, token_bytes: int) -> Fingerprint:
    """What KV of this engine depends on besides the tokens."""
    spec, compute = loaded.model.spec, loaded.compute
    return Fingerprint(
        namespace=config.namespace,
        model_digest=loaded.digest,
        layout=f"{spec.num_layers} layers, k v, {spec.num_kv_heads} heads, tokens, "
        f"{spec.head_dim}, {compute.kv_layout.name}, {config.disk_kv_dtype} on disk",
        dtype=str(compute.dtype),
        arithmetic=f"{compute.ops.name} {arithmetic_of(compute.ops, compute.device)}",
        token_bytes=token_bytes,
    )


def disk_packing(config: EngineConfig, loaded: LoadedModel) -> Int8Packing | None:
    """How KV lies on disk, if not as it is. Raises ConfigError."""
    if config.disk_kv_dtype == "same":
        return None
    if config.deterministic:
        raise ConfigError(
            "disk_kv_dtype='int8' changes the bits that deterministic=True promises: leave it at "
            "'same'"
        )
    dtype: FloatName = "bfloat16" if loaded.compute.dtype.itemsize == 2 else "float32"
    return Int8Packing(dtype, loaded.model.spec.head_dim)


def _open_disk(
    config: EngineConfig,
    resolved: ResolvedConfig,
    fingerprint: Fingerprint,
    victims: Victims,
    packing: Int8Packing | None,
    gate: Gate | None,
) -> DiskTier:
    if resolved.disk_kv_bytes < MIN_QUOTA_BYTES:
        raise ConfigError(
            f"disk_kv_bytes={resolved.disk_kv_bytes}: at least {MIN_QUOTA_BYTES} are needed, or 0"
        )
    return DiskTier(
        config.cache_dir / STORE_FOLDER,
        quota_bytes=resolved.disk_kv_bytes,
        fingerprint=fingerprint,
        clock=time.time,
        victims=victims,
        packing=packing,
        gate=gate,
    )
