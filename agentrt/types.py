"""Frozen values that cross the border between the engine and its caller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import instance_of, optional

from agentrt.errors import RequestInvalid

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Role = Literal["system", "user", "assistant", "tool"]
TierName = Literal["device", "host", "disk"]
ToolChoice = Literal["auto", "required", "once"]
TurnReason = Literal["stop", "length", "max_steps", "guard"]


def _within(low: float, high: float, *, open_low: bool = False):  # type: ignore[no-untyped-def]
    """A validator for a finite number in [low, high], or (low, high] with `open_low`."""

    def check(_: object, attribute: Attribute[Any], value: Any) -> None:
        bad_type = isinstance(value, bool) or not isinstance(value, int | float)
        if (
            bad_type
            or not math.isfinite(value)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            bracket = "(" if open_low else "["
            raise RequestInvalid(
                f"{attribute.name} must be a number in {bracket}{low}, {high}], got {value!r}"
            )

    return check


def _whole(low: int, high: int):  # type: ignore[no-untyped-def]
    """A validator for an int in [low, high]."""

    def check(_: object, attribute: Attribute[Any], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestInvalid(
                f"{attribute.name} must be a whole number in [{low}, {high}], got {value!r}"
            )

    return check


def _strings(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _nonempty_strings(_: object, attribute: Attribute[Any], value: tuple[Any, ...]) -> None:
    if not all(isinstance(text, str) and text for text in value):
        raise RequestInvalid(f"{attribute.name} must hold non-empty strings, got {value!r}")


def _token_ids(_: object, attribute: Attribute[Any], value: tuple[Any, ...]) -> None:
    if not all(isinstance(token, int) and token >= 0 for token in value):
        raise RequestInvalid(f"{attribute.name} must hold token ids, got {value!r}")


def _biases(_: object, attribute: Attribute[Any], value: Mapping[Any, Any]) -> None:
    for token, bias in value.items():
        if (
            not isinstance(token, int)
            or token < 0
            or not isinstance(bias, int | float)
            or math.isnan(bias)
        ):
            raise RequestInvalid(
                f"{attribute.name} maps token ids to numbers, got {token!r}: {bias!r}"
            )


@frozen(kw_only=True)
class GenerateOptions:
    """How one request is sampled and when it ends.

    `temperature=0` is greedy. `seed` makes a sampled request repeatable whatever else is in the
    batch; without it a fresh seed is drawn. `top_k=0`, `top_p=1` and `min_p=0` switch those filters
    off. `top_logprobs` asks for the log-probability of each output token and of that many best ones
    (0: the output token alone; None: none). `n` samples share one prompt. `grammar` constrains the
    output (see `agentrt.grammar`); with `end_in_time` its text is complete within `max_tokens`,
    where that is possible: before they run out it is closed the shortest way, whatever the model
    would write, and the reason is "length" all the same.

    Raises RequestInvalid, naming the field, on a value out of range.
    """

    max_tokens: int = field(default=256, validator=_whole(1, 1 << 24))
    temperature: float = field(default=0.0, validator=_within(0.0, 100.0))
    top_k: int = field(default=0, validator=_whole(0, 1 << 24))
    top_p: float = field(default=1.0, validator=_within(0.0, 1.0, open_low=True))
    min_p: float = field(default=0.0, validator=_within(0.0, 1.0))
    repetition_penalty: float = field(default=1.0, validator=_within(0.0, 100.0, open_low=True))
    presence_penalty: float = field(default=0.0, validator=_within(-100.0, 100.0))
    frequency_penalty: float = field(default=0.0, validator=_within(-100.0, 100.0))
    logit_bias: Mapping[int, float] = field(factory=dict, validator=_biases)
    stop: tuple[str, ...] = field(default=(), converter=_strings, validator=_nonempty_strings)
    stop_token_ids: tuple[int, ...] = field(default=(), converter=tuple, validator=_token_ids)
    ignore_eos: bool = field(default=False, validator=instance_of(bool))
    seed: int | None = field(default=None, validator=optional(_whole(0, (1 << 63) - 1)))
    top_logprobs: int | None = field(default=None, validator=optional(_whole(0, 64)))
    n: int = field(default=1, validator=_whole(1, 256))
    grammar: str | None = None  # an llguidance grammar: build one with agentrt.grammar
    end_in_time: bool = field(default=False, validator=instance_of(bool))


@frozen
class TokenLogprob:
    """One output token's log-probability, and the best alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@frozen(kw_only=True)
class Usage:
    """What one completion cost. Times are seconds from submission, on the engine's clock."""

    prompt_tokens: int
    cached_tokens: Mapping[TierName, int]
    output_tokens: int
    ttft_s: float
    total_s: float


@frozen(kw_only=True)
class Completion:
    """One finished generation. `others` holds the further samples where `n > 1`, `value` what was
    asked for with `output`."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    others: tuple[Completion, ...] = ()
    value: Any = None


@frozen
class ToolCall:
    """A call that the model made: a tool's name and its parsed arguments."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@frozen(kw_only=True)
class Message:
    """One message of a conversation, as chat templates know it."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the tool, where role is "tool"
    tool_call_id: str | None = None


@frozen
class TextDelta:
    """New text, with the token ids that made it. Ids come as they are generated, with their
    log-probabilities where those were asked for; text is held back while it may still become a stop
    string or an unfinished character."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@frozen
class Finished:
    """The last event of `Engine.stream`."""

    completion: Completion


@frozen
class ReasoningDelta:
    """New text of what the model thinks before it answers."""

    text: str


@frozen
class ToolCallStarted:
    """The model began a tool call."""

    index: int


@frozen
class ToolCallDelta:
    """New text of a call's arguments, as the model writes them. `name` is the tool, once known."""

    index: int
    name: str
    text: str


@frozen
class ToolCallArguments:
    """A tool call is complete: its arguments are parsed and valid."""

    call: ToolCall


@frozen
class ToolResult:
    """A tool ended: what the model will read, whether it is an error, and the seconds it took."""

    call: ToolCall
    content: str
    is_error: bool
    seconds: float


@frozen
class TurnFinished:
    """The last event of `Session.stream`: the model answered without a call, or hit a limit.

    `reason` is what a guard said that stopped the turn, `reasoning` what the model thought on the
    way, `value` what was asked for with `output`, where the model came to answer.
    """

    text: str
    finish_reason: TurnReason
    steps: int
    reason: str = ""
    reasoning: str = ""
    value: Any = None


StreamEvent = TextDelta | Finished
SessionEvent = (
    TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallDelta
    | ToolCallArguments
    | ToolResult
    | TurnFinished
)


@frozen(kw_only=True)
class Step:
    """One generation of a turn, and the results of the tools that it called."""

    completion: Completion
    results: tuple[ToolResult, ...] = ()


@frozen(kw_only=True)
class Reply:
    """What `Session.run` returns: the last text, and every step on the way.

    `reason` is what a guard said that stopped the turn, `reasoning` what the model thought on the
    way, `value` what was asked for with `output`, where the model came to answer.
    """

    text: str
    finish_reason: TurnReason
    steps: tuple[Step, ...]
    reason: str = ""
    reasoning: str = ""
    value: Any = None
