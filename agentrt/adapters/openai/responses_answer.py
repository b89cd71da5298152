"""The answer to one Responses request, built up batch by batch."""

from __future__ import annotations

import time
from typing import Any

from attrs import define, field

from agentrt.adapters.openai.answer import encoded
from agentrt.adapters.openai.choices import Batch
from agentrt.adapters.openai.output_items import Event, OutputItems
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.responses_request import ResponsesRequest
from agentrt.adapters.openai.stored import Responses
from agentrt.adapters.openai.telling import Ended, EndReason, Telling
from agentrt.adapters.openai.tokens import num_cached_tokens
from agentrt.tokenizer import Tokenizer
from agentrt.types import Completion

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@define(eq=False, kw_only=True)
class ResponsesAnswer:
    """State: the output so far, how it ended, and how many events were told. A response that is
    complete is stored, if that is wanted, before its last event is told."""

    id: str
    request: ResponsesRequest
    created_s: float
    tokenizer: Tokenizer
    num_prompt_tokens: int
    tellings: list[Telling]
    store: Responses
    _items: OutputItems = field(init=False)
    _num_events: int = field(default=0, init=False)
    _reason: EndReason | None = field(default=None, init=False)
    _completion: Completion | None = field(default=None, init=False)
    _whole: dict[str, Any] | None = field(default=None, init=False)

    @_items.default
    def _new_items(self) -> OutputItems:
        return OutputItems(self.tokenizer)

    def begin(self) -> list[Event]:
        response = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return self._numbered([{"type": kind, "response": response} for kind in kinds])

    def push(self, batch: Batch) -> list[Event]:
        said = self.tellings[0].push(batch)
        if said and isinstance(said[-1], Ended):
            self._reason, self._completion = said[-1].reason, said[-1].completion
        return self._numbered(self._items.push(said))

    def end(self) -> list[Event]:
        if self._reason is None:  # closed before the end
            return []
        self._whole = response = self._complete()
        if self.request.stores:
            self.store.add(self.request, response)
        return self._numbered([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, refusal: Refusal) -> list[Event]:
        error = {"code": "server_error", "message": refusal.message}
        response = {**self._response("failed"), "error": error}
        return self._numbered([{"type": "response.failed", "response": response}])

    def encode(self, event: Event) -> bytes:
        return f"event: {event['type']}\ndata: ".encode() + encoded(event) + b"\n\n"

    @property
    def last_bytes(self) -> bytes:
        return b""

    def whole(self) -> dict[str, Any]:
        assert self._whole is not None
        return self._whole

    def _complete(self) -> dict[str, Any]:
        reason = _INCOMPLETE.get(self._reason or "")
        response = self._response("completed" if reason is None else "incomplete")
        response["incomplete_details"] = None if reason is None else {"reason": reason}
        return {**response, "completed_at": time.time(), "usage": self._usage()}

    def _numbered(self, events: list[Event]) -> list[Event]:
        first, self._num_events = self._num_events, self._num_events + len(events)
        return [{**event, "sequence_number": first + i} for i, event in enumerate(events)]

    def _response(self, status: str) -> dict[str, Any]:
        return {
            **self.request.echo,
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": list(self._items.items),
            "service_tier": "default",
            "store": self.request.stores,
            "usage": None,
        }

    def _usage(self) -> dict[str, Any]:
        telling = self.tellings[0]
        reasoning_tokens = len(self.tokenizer.encode(telling.thoughts)) if telling.thoughts else 0
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": num_cached_tokens(self._completion),
                "cache_write_tokens": 0,
            },
            "output_tokens": telling.num_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": self.num_prompt_tokens + telling.num_tokens,
        }
