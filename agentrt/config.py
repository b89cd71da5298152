"""Engine settings: what the caller asks for, and the numbers derived from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import ge, in_, instance_of, optional

from agentrt.errors import ConfigError

KV_SHARE_OF_FREE_MEMORY = 0.3
HOST_SHARE_OF_FREE_MEMORY = 0.3
DISK_SHARE = 0.1  # of the free space where the cache folder lies
MOST_DISK_BYTES = 8 << 30
LEAST_DISK_BYTES = 256 << 20
KV_SHARE_OF_FREE_DEVICE_MEMORY = 0.8
TOOL_FORMATS = ("hermes", "llama-json", "llama-pythonic", "mistral", "mistral-named")
BLOCK_TOKENS = {"cpu": 64, "cuda": 64}
STEP_TOKENS = {"cpu": 256, "cuda": 2048}


def default_cache_dir() -> Path:
    """`$AGENTRT_CACHE_DIR`, else `~/.cache/agentrt`."""
    return Path(os.environ.get("AGENTRT_CACHE_DIR", "~/.cache/agentrt")).expanduser()


def _cache_dir(value: str | os.PathLike[str] | None) -> Path:
    return default_cache_dir() if value is None else Path(value).expanduser()


def _checked(validator: Any) -> Any:
    """The validator, with attrs' errors turned into ConfigError."""

    def check(instance: object, attribute: Attribute[Any], value: Any) -> None:
        try:
            validator(instance, attribute, value)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{attribute.name}={value!r}: {exc.args[0]}") from exc

    return check


def _choice(*names: str) -> Any:
    return _checked(in_(names))


def _count(low: int) -> Any:
    return _checked(optional([instance_of(int), ge(low)]))


@frozen(kw_only=True)
class EngineConfig:
    """How an engine runs. None means: chosen from the machine and the model.

    `weights="auto"` never drops precision that the file has. `device_kv_bytes` is the KV pool;
    `block_tokens` its unit. `host_kv_bytes` and `disk_kv_bytes` are the tiers below it; 0 switches
    one off. `disk_kv_dtype="int8"` keeps half as many bytes on disk of bfloat16 KV, and a quarter
    of float32; what comes back is then not quite what was computed. `kv_dtype="fp8"` keeps KV in 8
    bits in every tier (CUDA only): twice as many tokens fit, and half the bytes are read, for
    keys and values that are rounded more. By default a CPU has no host tier, as its pool is host
    memory already. `eviction="lru"` is there to be compared with.
    `step_tokens` bounds the work of one step: decode rows first, then prefill chunks.
    `deterministic` makes float products independent of the batch too (int8 ones are anyway).
    `tool_format` is how the model writes tool calls: "auto" is what its chat template shows, and a
    template without tools gets the form of Hermes. `long_prefill="triton"` keeps cuDNN out of
    prefill after long contexts on CUDA, where "auto" lets it attend to them.
    `decode_launch="persistent"` computes a decode step of at most 8 rows in one launch on CUDA;
    with more rows steps are graphs, as they all are by default. `random_weights` runs a folder that
    holds config.json alone, for benchmarks. `speculation` lets a step check guesses of the next
    tokens, which saves steps and changes no output. `max_waiting` bounds the queue (Overloaded
    beyond it).

    Raises ConfigError, naming the field, on a value out of range.
    """

    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", validator=_choice("auto", "cpu", "cuda")
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", validator=_choice("auto", "float32", "bfloat16")
    )
    weights: Literal["auto", "int8", "int4", "fp8"] = field(
        default="auto", validator=_choice("auto", "int8", "int4", "fp8")
    )
    cache_dir: Path = field(default=None, converter=_cache_dir)
    device_kv_bytes: int | None = field(default=None, validator=_count(1))
    host_kv_bytes: int | None = field(default=None, validator=_count(0))
    disk_kv_bytes: int | None = field(default=None, validator=_count(0))
    disk_kv_dtype: Literal["same", "int8"] = field(
        default="same", validator=_choice("same", "int8")
    )
    kv_dtype: Literal["auto", "fp8"] = field(default="auto", validator=_choice("auto", "fp8"))
    eviction: Literal["worth", "lru"] = field(default="worth", validator=_choice("worth", "lru"))
    block_tokens: int | None = field(default=None, validator=_count(1))
    max_context_tokens: int | None = field(default=None, validator=_count(2))
    max_batch: int = field(default=64, validator=_count(1))
    max_waiting: int = field(default=4096, validator=_count(1))
    step_tokens: int | None = field(default=None, validator=_count(1))
    deterministic: bool = field(default=False, validator=_checked(instance_of(bool)))
    namespace: str = field(default="", validator=_checked(instance_of(str)))
    tool_format: str = field(default="auto", validator=_choice("auto", *TOOL_FORMATS))
    long_prefill: Literal["auto", "triton"] = field(
        default="auto", validator=_choice("auto", "triton")
    )
    decode_launch: Literal["graph", "persistent"] = field(
        default="graph", validator=_choice("graph", "persistent")
    )
    speculation: bool = field(default=True, validator=_checked(instance_of(bool)))
    random_weights: bool = field(default=False, validator=_checked(instance_of(bool)))

    def resolve(
        self,
        *,
        device: str,
        kv_token_bytes: int,
        model_context_tokens: int,
        free_device_bytes: int | None = None,
    ) -> ResolvedConfig:
        """The numbers of one engine, for a model whose KV takes `kv_token_bytes` a token.
        `free_device_bytes` is given where the device has memory of its own.

        Raises ConfigError where the pool cannot hold one block for each of two requests.
        """
        block_tokens = self.block_tokens or BLOCK_TOKENS[device]
        context = min(self.max_context_tokens or model_context_tokens, model_context_tokens)
        block_bytes = block_tokens * kv_token_bytes
        useful_bytes = (-(-context // block_tokens) + 1) * block_bytes * self.max_batch
        pool_bytes = self.device_kv_bytes
        if pool_bytes is None:
            if free_device_bytes is None:
                free_bytes = int(free_memory_bytes() * KV_SHARE_OF_FREE_MEMORY)
            else:
                free_bytes = int(free_device_bytes * KV_SHARE_OF_FREE_DEVICE_MEMORY)
            pool_bytes = min(useful_bytes, free_bytes)
        num_blocks = pool_bytes // block_bytes
        if num_blocks < 2:
            raise ConfigError(
                f"device_kv_bytes={pool_bytes} holds {num_blocks} blocks of {block_bytes} bytes "
                f"({block_tokens} tokens): raise it to {2 * block_bytes} or lower block_tokens"
            )
        host_bytes, disk_bytes = self._lower_bytes(device)
        return ResolvedConfig(
            host_kv_bytes=host_bytes,
            disk_kv_bytes=disk_bytes,
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            kv_token_bytes=kv_token_bytes,
            max_context_tokens=context,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            step_tokens=max(self.step_tokens or STEP_TOKENS[device], self.max_batch),
            decode_launch=self.decode_launch,
        )

    def _lower_bytes(self, device: str) -> tuple[int, int]:
        """The budgets of the host and the disk tier."""
        host_bytes = self.host_kv_bytes
        if host_bytes is None:
            share = HOST_SHARE_OF_FREE_MEMORY if device == "cuda" else 0.0
            host_bytes = int(share * free_memory_bytes())
        disk_bytes = self.disk_kv_bytes
        if disk_bytes is None:
            disk_bytes = min(MOST_DISK_BYTES, int(DISK_SHARE * free_disk_bytes(self.cache_dir)))
            # Random weights are for measuring: they would leave rubbish behind.
            if disk_bytes < LEAST_DISK_BYTES or self.random_weights:
                disk_bytes = 0
        return host_bytes, disk_bytes


@frozen(kw_only=True)
class ResolvedConfig:
    """What the scheduler and the runner work with: every number known."""

    host_kv_bytes: int
    disk_kv_bytes: int
    block_tokens: int
    num_blocks: int
    kv_token_bytes: int
    max_context_tokens: int
    max_batch: int
    max_waiting: int
    step_tokens: int
    decode_launch: Literal["graph", "persistent"] = "graph"

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_blocks * self.block_tokens


def free_disk_bytes(folder: Path) -> int:
    """What is free where `folder` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's if less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
