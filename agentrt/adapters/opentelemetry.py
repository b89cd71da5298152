"""OpenTelemetry: spans and metrics of turns, generations and tools, in the GenAI conventions.

    with instrument(engine):
        await session.run("...")

All names are in `opentelemetry_names`. Without `content=True` no prompt,
output, argument or result is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agentrt.adapters import opentelemetry_names as names
from agentrt.errors import MissingExtra
from agentrt.observer import Observer, Scope

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
except ImportError as exc:
    raise MissingExtra('this needs OpenTelemetry: pip install "agentrt[opentelemetry]"') from exc

if TYPE_CHECKING:
    from agentrt.engine import Engine
    from agentrt.request import Request
    from agentrt.types import FinishReason, ToolCall, ToolResult


@contextmanager
def instrument(
    engine: Engine,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    content: bool = False,
) -> Iterator[None]:
    """Record what an open engine does during the block. Without providers, the global ones serve.

    `content` also records prompts, outputs, arguments and results of tools, as text.
    """
    parts = engine._open
    tracer = trace.get_tracer(names.SCOPE, None, tracer_provider, names.SCHEMA_URL)
    meter = metrics.get_meter(names.SCOPE, "", meter_provider, names.SCHEMA_URL)
    observer = _Telemetry(tracer, meter, parts.model_name, parts.chat.decode if content else None)
    with parts.loop.observers.attached(observer):
        yield


class _Telemetry(Observer):
    """Owns the open spans. Spans of turns and tools change on the event loop's thread, those of
    requests are made there and ended on the step thread."""

    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter, model: str, decode: Any) -> None:
        self._tracer, self._model, self._decode = tracer, model, decode
        self._turns: dict[int, tuple[Span, float]] = {}
        self._requests: dict[str, tuple[Span, Scope]] = {}
        self._tools: dict[int, tuple[Span, float]] = {}
        self._metrics: dict[str, Any] = {}
        for name, (unit, text, bounds) in names.METRICS.items():
            if bounds is None:
                self._metrics[name] = meter.create_counter(name, unit, text)
            else:
                self._metrics[name] = meter.create_histogram(
                    name, unit, text, explicit_bucket_boundaries_advisory=bounds
                )

    def turn_began(self, scope: Scope, now: float) -> None:
        assert scope.turn is not None
        span = self._start("invoke_agent", scope.agent, None, {names.AGENT: scope.agent})
        self._turns[scope.turn] = span, now

    def turn_ended(self, scope: Scope, error: BaseException | None, now: float) -> None:
        span, began = self._turns.pop(scope.turn or 0, (None, now))
        if span is not None:
            labels = {
                **self._labels("invoke_agent"),
                names.AGENT: scope.agent,
                **_error(span, error),
            }
            self._metrics[names.TURN_DURATION].record(now - began, labels)
            span.end()

    def submitted(self, request: Request, scope: Scope, now: float) -> None:
        operation = "text_completion" if scope.turn is None else "chat"
        facts = {name: getattr(request.options, field) for field, name in names.REQUEST.items()}
        if scope.agent:
            facts[names.CONVERSATION] = scope.agent
        if self._decode is not None:
            prompt = self._decode(request.tokens[: request.num_prompt_tokens])
            facts[names.INPUT] = _messages("user", prompt)
        span = self._start(operation, self._model, scope, facts)
        self._requests[request.id] = span, scope

    def ended(self, request: Request, outcome: FinishReason | BaseException, now: float) -> None:
        span, scope = self._requests.pop(request.id, (None, None))
        if span is None or scope is None:
            return
        usage, labels = (
            request.usage(now),
            self._labels("chat" if scope.turn else "text_completion"),
        )
        cached = sum(usage.cached_tokens.values())
        facts: dict[str, Any] = {
            names.RESPONSE_ID: request.id,
            names.USAGE_IN: usage.prompt_tokens,
            names.USAGE_OUT: usage.output_tokens,
            names.USAGE_CACHED: cached,
        }
        for tier, num_tokens in usage.cached_tokens.items():
            facts[names.USAGE_TIER.format(tier=tier)] = num_tokens
        if request.first_token_s is not None:
            facts[names.FIRST_CHUNK] = usage.ttft_s
        if isinstance(outcome, BaseException):
            labels |= _error(span, outcome)
        else:
            facts[names.FINISH] = [outcome]
        if self._decode is not None:
            facts[names.OUTPUT] = _messages("assistant", request.text.text)
        _set(span, facts)
        self._note_generation(labels, facts, usage.total_s)
        span.end()

    def _note_generation(
        self, labels: dict[str, Any], facts: Mapping[str, Any], total_s: float
    ) -> None:
        self._metrics[names.DURATION].record(total_s, labels)
        if names.FIRST_CHUNK in facts:
            self._metrics[names.FIRST_CHUNK_AFTER].record(facts[names.FIRST_CHUNK], labels)
        counted = {key: value for key, value in labels.items() if key != names.ERROR}
        for kind, fact in (("input", names.USAGE_IN), ("output", names.USAGE_OUT)):
            usage = {**counted, names.TOKEN_TYPE: kind}
            self._metrics[names.TOKEN_USAGE].record(facts[fact], usage)
        self._metrics[names.CACHED_TOKENS].add(facts[names.USAGE_CACHED], counted)

    def tool_began(self, scope: Scope, call: ToolCall, now: float) -> None:
        facts = {names.TOOL_NAME: call.name, names.TOOL_ID: call.id, names.TOOL_TYPE: "function"}
        if self._decode is not None:
            facts[names.TOOL_ARGUMENTS] = json.dumps(dict(call.arguments), default=str)
        span = self._start("execute_tool", call.name, scope, facts)
        self._tools[id(call)] = span, now
        if scope.turn is not None:  # the task is the tool's own, and so is its context
            context.attach(trace.set_span_in_context(span))

    def tool_ended(
        self, scope: Scope, call: ToolCall, result: ToolResult | None, now: float
    ) -> None:
        span, began = self._tools.pop(id(call), (None, now))
        if span is None:
            return
        labels = {**self._labels("execute_tool"), names.TOOL_NAME: call.name}
        if result is not None and result.is_error:
            labels[names.ERROR] = "tool_error"
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute(names.ERROR, "tool_error")
        if result is not None and self._decode is not None:
            span.set_attribute(names.TOOL_RESULT, result.content)
        self._metrics[names.TOOL_DURATION].record(now - began, labels)
        span.end()

    def _start(
        self, operation: str, what: str, scope: Scope | None, facts: Mapping[str, Any]
    ) -> Span:
        """A span below its turn's, or where there is none, below the caller's."""
        turn = self._turns.get(scope.turn) if scope is not None and scope.turn else None
        parent = None if turn is None else trace.set_span_in_context(turn[0])
        span = self._tracer.start_span(f"{operation} {what}", parent, SpanKind.INTERNAL)
        _set(span, {**self._labels(operation), **facts})
        return span

    def _labels(self, operation: str) -> dict[str, Any]:
        return {names.OPERATION: operation, names.PROVIDER: "agentrt", names.MODEL: self._model}


def _set(span: Span, facts: Mapping[str, Any]) -> None:
    """Attributes that have a value."""
    for name, value in facts.items():
        if value is not None and value != ():
            span.set_attribute(name, value)


def _error(span: Span, error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {}
    span.set_status(Status(StatusCode.ERROR, str(error)))
    span.set_attribute(names.ERROR, type(error).__qualname__)
    return {names.ERROR: type(error).__qualname__}


def _messages(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}])
