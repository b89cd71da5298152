"""What is answered instead of a result: a status and OpenAI's error body."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, frozen

from agentrt.errors import (
    AgentrtError,
    EngineClosed,
    EngineFailed,
    GuardStopped,
    ModelUnsupported,
    Overloaded,
    PromptTooLong,
    RequestInvalid,
    ToolInvalid,
)

INVALID, OVERLOADED, FAILED = "invalid_request_error", "rate_limit_error", "server_error"
# The status, the type and the code of our errors; the first class that fits counts.
_KINDS: tuple[tuple[type[AgentrtError], int, str, str | None], ...] = (
    (PromptTooLong, 400, INVALID, "context_length_exceeded"),
    (RequestInvalid, 400, INVALID, None),
    (ToolInvalid, 400, INVALID, None),
    (ModelUnsupported, 400, INVALID, "unsupported_parameter"),
    (GuardStopped, 400, INVALID, "content_filter"),
    (Overloaded, 429, OVERLOADED, "overloaded"),
    (EngineClosed, 503, FAILED, "engine_closed"),
    (EngineFailed, 500, FAILED, "engine_failed"),
    (AgentrtError, 500, FAILED, None),
)


@frozen
class Refusal(Exception):
    """A request that gets an error body. `param` is the path of the field that is wrong.

    Clients may try again what `is_passing` says, and nothing else: the rest would fail again.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = field(default=400, kw_only=True)
    kind: str = field(default=INVALID, kw_only=True)

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def is_passing(self) -> bool:
        """Whether the same request may be served later."""
        return self.status == 429

    @property
    def headers(self) -> Mapping[str, str]:
        """Clients of OpenAI heed this one before they try again."""
        return MappingProxyType({"x-should-retry": "true" if self.is_passing else "false"})


def refusal_of(error: AgentrtError) -> Refusal:
    """The answer to one of the engine's errors."""
    _, status, kind, code = next(each for each in _KINDS if isinstance(error, each[0]))
    return Refusal(str(error), code=code, status=status, kind=kind)


def unsupported(path: str, why: str) -> Refusal:
    """For what OpenAI's API knows and a local model cannot do: never ignored."""
    return Refusal(f"{path} is not supported here: {why}", path, "unsupported_parameter")
