"""Prometheus and OpenTelemetry, each with its own library's reader."""

import asyncio
import json

import pytest
from scripted import scripted

from agentrt import GenerateOptions, tool
from agentrt.errors import RequestInvalid
from agentrt.observer import agent

prometheus_client = pytest.importorskip("prometheus_client")
pytest.importorskip("opentelemetry.sdk")
from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes  # noqa: E402
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics  # noqa: E402
from opentelemetry.semconv.attributes import error_attributes  # noqa: E402
from opentelemetry.semconv.schemas import Schemas  # noqa: E402

from agentrt.adapters import opentelemetry_names as names  # noqa: E402
from agentrt.adapters.opentelemetry import instrument  # noqa: E402
from agentrt.adapters.prometheus import AgentrtCollector  # noqa: E402

OPTIONS = GenerateOptions(max_tokens=120)
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"key": "a"}}\n</tool_call>'


@tool
async def look_up(key: str) -> str:
    """Look a key up."""
    trace.get_tracer("user", tracer_provider=PROVIDERS[-1]).start_span("inner").end()
    return f"{key} is 1"


@tool
async def fail(key: str) -> str:
    """Always fails."""
    raise KeyError(key)


PROVIDERS: list[TracerProvider] = []


# ---- Prometheus


def scraped(registry):
    """What a scrape gives, as Prometheus itself reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, sample.labels.get("tier")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_scrape_shows_the_statistics(tokenizer, template):
    registry = prometheus_client.CollectorRegistry()
    engine = scripted(tokenizer, template, ["Hello!"] * 2)
    registry.register(AgentrtCollector(engine))
    assert scraped(registry) == {}  # not open yet
    async with engine:
        await engine.generate("Hi, hello there", OPTIONS)
        await engine.generate("Hi, hello there", OPTIONS)
        stats, seen = engine.stats(), scraped(registry)
    assert seen["agentrt_requests_finished_total", None] == stats.finished == 2
    assert seen["agentrt_output_tokens_total", None] == stats.output_tokens > 0
    assert seen["agentrt_prompt_tokens_computed_total", None] == stats.computed_tokens
    cached = seen["agentrt_prompt_tokens_cached_total", "device"]
    assert cached == stats.cached_tokens > 0
    assert seen["agentrt_kv_bytes", "device"] == stats.kv_used_bytes > 0
    assert seen["agentrt_kv_limit_bytes", "device"] == stats.kv_bytes
    assert seen["agentrt_forward_seconds_total", None] == stats.forward_s
    assert scraped(registry) == {}  # closed: a gap


async def test_tiers_are_labels_and_two_engines_share_a_registry(tokenizer, template, tmp_path):
    registry = prometheus_client.CollectorRegistry()
    folder = {"cache_dir": tmp_path, "host_kv_bytes": 1 << 20, "disk_kv_bytes": 1 << 24}
    async with (
        scripted(tokenizer, template, ["x"], **folder) as first,
        scripted(tokenizer, template, ["x"]) as second,
    ):
        registry.register(AgentrtCollector(first, name="first"))
        registry.register(AgentrtCollector(second, name="second"))
        text = prometheus_client.generate_latest(registry).decode()
        tiers = {key[1] for key in scraped(registry) if key[0] == "agentrt_kv_bytes"}
    assert tiers == {"device", "host", "disk"}
    assert 'agentrt_steps_total{model="first"}' in text
    assert 'agentrt_steps_total{model="second"}' in text


# ---- OpenTelemetry


class Telemetry:
    def __init__(self):
        self.spans_out, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans_out))
        self.meters = MeterProvider([self.reader])
        PROVIDERS.append(self.tracers)

    def spans(self):
        return {span.name: span for span in self.spans_out.get_finished_spans()}

    def points(self):
        data = self.reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def instrument(self, engine, **options):
        return instrument(
            engine, tracer_provider=self.tracers, meter_provider=self.meters, **options
        )


@pytest.fixture
def telemetry():
    made = Telemetry()
    yield made
    PROVIDERS.remove(made.tracers)
    made.tracers.shutdown()
    made.meters.shutdown()


async def test_a_turn_is_a_span_with_its_generations_and_tools_below(
    tokenizer, template, telemetry
):
    async with scripted(tokenizer, template, [CALL, "It is 1."]) as engine:
        with telemetry.instrument(engine):
            with agent("ada"):
                session = engine.session(tools=[look_up], options=OPTIONS)
            with telemetry.tracers.get_tracer("user").start_as_current_span("request"):
                reply = await session.run("What is a?")
    done = telemetry.spans_out.get_finished_spans()
    spans = telemetry.spans()
    assert sorted(span.name for span in done) == [
        "chat fake", "chat fake", "execute_tool look_up", "inner", "invoke_agent ada", "request",
    ]  # fmt: skip
    turn = spans["invoke_agent ada"]
    assert turn.parent.span_id == spans["request"].context.span_id
    assert spans["execute_tool look_up"].parent.span_id == turn.context.span_id
    assert spans["inner"].parent.span_id == spans["execute_tool look_up"].context.span_id
    first, second = (span for span in done if span.name == "chat fake")
    for span, step in zip((first, second), reply.steps, strict=True):
        usage, facts = step.completion.usage, span.attributes
        assert span.parent.span_id == turn.context.span_id
        assert facts[names.OPERATION] == "chat"
        assert facts[names.USAGE_IN] == usage.prompt_tokens
        assert facts[names.USAGE_OUT] == usage.output_tokens
        assert facts[names.USAGE_CACHED] == sum(usage.cached_tokens.values())
        assert facts[names.USAGE_TIER.format(tier="device")] == usage.cached_tokens["device"]
        assert facts[names.FINISH] == ("stop",)
        assert facts[names.RESPONSE_ID] == step.completion.request_id
        assert facts[names.REQUEST["max_tokens"]] == 120
        assert facts[names.CONVERSATION] == "ada"
    assert second.attributes[names.USAGE_CACHED] > 0


async def test_metrics_add_up_and_are_those_of_the_table(tokenizer, template, telemetry):
    async with scripted(tokenizer, template, [CALL, "It is 1."]) as engine:
        with telemetry.instrument(engine):
            session = engine.session(tools=[look_up], options=OPTIONS)
            await session.run("What is a?")
        stats = engine.stats()
    points = telemetry.points()
    assert set(points) == set(names.METRICS)
    used = {point.attributes[names.TOKEN_TYPE]: point for point in points[names.TOKEN_USAGE]}
    assert (used["input"].sum, used["input"].count) == (stats.prompt_tokens, 2)
    assert (used["output"].sum, used["output"].count) == (stats.output_tokens, 2)
    (cached,) = points[names.CACHED_TOKENS]
    assert cached.value == stats.cached_tokens > 0
    (duration,) = points[names.DURATION]
    assert (duration.count, duration.explicit_bounds) == (2, names.SECONDS)
    assert points[names.TOOL_DURATION][0].count == 1


@pytest.mark.parametrize("content", [False, True])
async def test_text_is_recorded_only_where_it_is_asked_for(tokenizer, template, telemetry, content):
    async with scripted(tokenizer, template, [CALL, "It is 1."]) as engine:
        with telemetry.instrument(engine, content=content):
            session = engine.session(system="Secret.", tools=[look_up], options=OPTIONS)
            await session.run("What is a?")
    told = "".join(span.to_json() for span in telemetry.spans_out.get_finished_spans())
    for text in ("Secret.", "What is a?", "It is 1.", "a is 1"):
        assert (text in told) is content
    if content:
        chat = telemetry.spans()["chat fake"].attributes
        (message,) = json.loads(chat[names.OUTPUT])
        assert message == {
            "role": "assistant",
            "parts": [{"type": "text", "content": "It is 1."}],
        }


async def test_errors_and_cancelled_work_end_their_spans(tokenizer, template, telemetry):
    call = CALL.replace("look_up", "fail")
    async with scripted(tokenizer, template, [call, "It failed.", "Never"]) as engine:
        with telemetry.instrument(engine):
            session = engine.session(tools=[fail], options=OPTIONS)
            await session.run("What is a?")
            engine.gate.close()
            turn = asyncio.create_task(session.run("And b?"))
            await engine.until_held()
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)
            engine.gate.open()
            await engine.check()
            with pytest.raises(RequestInvalid):
                await engine.generate([10**9])
    done = telemetry.spans_out.get_finished_spans()
    tools = [span for span in done if span.name == "execute_tool fail"]
    assert tools[0].attributes[names.ERROR] == "tool_error"
    chats = [span for span in done if span.name == "chat fake"]
    assert chats[-1].attributes[names.FINISH] == ("cancelled",)
    turns = [span for span in done if span.name.startswith("invoke_agent")]
    assert turns[-1].attributes[names.ERROR] == "CancelledError"


async def test_nothing_is_recorded_outside_the_block(tokenizer, template, telemetry):
    async with scripted(tokenizer, template, ["a", "b"]) as engine:
        with telemetry.instrument(engine):
            await engine.generate("Hello", OPTIONS)
        await engine.generate("Hello", OPTIONS)
    (span,) = telemetry.spans_out.get_finished_spans()
    assert span.name == "text_completion fake"


class NotedMeter:
    """Notes the instruments that are asked of it: name -> kind and unit."""

    def __init__(self):
        self.made = {}

    def __getattr__(self, kind):
        def make(name, unit="", description=""):
            self.made[name] = kind, unit

        return make


def test_every_name_is_one_of_the_released_conventions():
    """As OpenTelemetry's own package has them; but for ours, for which they have no word, and for
    two whose release is awaited: once the package has these, this fails, and the table changes."""
    attributes = vars(gen_ai_attributes) | vars(error_attributes)
    released = {value for value in attributes.values() if isinstance(value, str)}
    texts = [value for name, value in vars(names).items() if name.isupper()]
    texts = [text for text in texts if isinstance(text, str)] + [*names.REQUEST.values()]
    used = {text for text in texts if "." in text and "/" not in text}
    assert used - names.METRICS.keys() - released == {names.USAGE_TIER}

    meter = NotedMeter()
    for name, function in vars(gen_ai_metrics).items():
        if name.startswith("create_"):
            function(meter)
    ours = {names.CACHED_TOKENS, *names.UNRELEASED}
    assert names.METRICS.keys() - meter.made.keys() == ours
    for name in names.METRICS.keys() - ours:
        unit, _, bounds = names.METRICS[name]
        assert meter.made[name] == (
            "create_counter" if bounds is None else "create_histogram",
            unit,
        )
    assert names.SCHEMA_URL in {schema.value for schema in Schemas}
    operations = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
    assert {"chat", "text_completion", "execute_tool", "invoke_agent"} <= operations
