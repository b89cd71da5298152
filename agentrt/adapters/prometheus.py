"""Prometheus: `engine.stats()` as metrics in a registry of the caller's.

    registry.register(AgentrtCollector(engine))

A scrape reads one snapshot; between scrapes nothing is counted or kept here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentrt.errors import EngineClosed, MissingExtra

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise MissingExtra('this needs prometheus-client: pip install "agentrt[prometheus]"') from exc

if TYPE_CHECKING:
    from agentrt.engine import Engine
    from agentrt.metrics import Stats

_MODEL = ("model",)

# Field of Stats -> name and help. Prometheus appends _total to counters.
_COUNTERS = {
    "finished": ("agentrt_requests_finished", "Requests that ended, whatever the reason"),
    "cancelled": ("agentrt_requests_cancelled", "Of these, those that were cancelled"),
    "preempted": ("agentrt_requests_preempted", "Times that a running request had to make room"),
    "steps": ("agentrt_steps", "Steps of the model"),
    "computed_tokens": ("agentrt_prompt_tokens_computed", "Prompt tokens that were prefilled"),
    "recomputed_tokens": (
        "agentrt_tokens_recomputed",
        "Tokens computed once more after a preemption",
    ),
    "output_tokens": ("agentrt_output_tokens", "Tokens generated"),
    "drafted_tokens": ("agentrt_draft_tokens", "Guesses of the next tokens that were checked"),
    "accepted_tokens": ("agentrt_draft_tokens_accepted", "Of these, right ones"),
    "evicted_tokens": ("agentrt_evicted_tokens", "Tokens whose KV left the device"),
    "failed_loads": ("agentrt_failed_loads", "Loads from a lower tier that were computed instead"),
    "step_s": ("agentrt_step_seconds", "Time in steps"),
    "forward_s": ("agentrt_forward_seconds", "Of that, time in the model and the sampler"),
}
_GAUGES = {
    "waiting": ("agentrt_requests_waiting", "Requests that wait for room"),
    "running": ("agentrt_requests_running", "Requests in the batch"),
    "last_batch_rows": ("agentrt_batch_rows", "Tokens that the last step computed"),
    "kv_blocks": ("agentrt_kv_blocks", "Blocks of the device's KV pool"),
    "kv_free_blocks": ("agentrt_kv_free_blocks", "Of these, free ones"),
}


class AgentrtCollector(Collector):
    """The metrics of one engine, labelled with its model.

    Two engines of one model in one registry need different names: give them `name`.
    """

    def __init__(self, engine: Engine, *, name: str | None = None) -> None:
        self._engine = engine
        self._name = name

    def describe(self) -> Iterator[Metric]:
        """Nothing: so the registry does not scrape an engine that is not open yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One snapshot. A closed engine has no metrics: Prometheus shows a gap."""
        try:
            stats = self._engine.stats()
        except EngineClosed:
            return
        label = (self._name or stats.model,)
        for field, (name, text) in _COUNTERS.items():
            yield _one(CounterMetricFamily(name, text, labels=_MODEL), label, stats, field)
        for field, (name, text) in _GAUGES.items():
            yield _one(GaugeMetricFamily(name, text, labels=_MODEL), label, stats, field)
        yield from _by_tier(stats, label)


def _one(
    family: CounterMetricFamily | GaugeMetricFamily,
    label: tuple[str],
    stats: Stats,
    field: str,
) -> Metric:
    family.add_metric(label, float(getattr(stats, field)))
    return family


def _by_tier(stats: Stats, label: tuple[str]) -> Iterator[Metric]:
    cached = CounterMetricFamily(
        "agentrt_prompt_tokens_cached",
        "Prompt tokens whose KV was in a tier of the cache",
        labels=("model", "tier"),
    )
    for tier, num_tokens in {"device": stats.cached_tokens, **stats.loaded_tokens}.items():
        cached.add_metric((*label, tier), num_tokens)
    yield cached
    held = GaugeMetricFamily(
        "agentrt_kv_bytes", "Bytes of KV that a tier holds", labels=("model", "tier")
    )
    limits = GaugeMetricFamily(
        "agentrt_kv_limit_bytes", "The budget of a tier in bytes", labels=("model", "tier")
    )
    held.add_metric((*label, "device"), stats.kv_used_bytes)
    limits.add_metric((*label, "device"), stats.kv_bytes)
    if stats.lower is not None:
        held.add_metric((*label, "host"), stats.lower.host_bytes)
        limits.add_metric((*label, "host"), stats.lower.host_limit_bytes)
        if stats.lower.disk is not None:
            held.add_metric((*label, "disk"), stats.lower.disk.payload_bytes)
    yield held
    yield limits
