"""OpenAI's API over one engine: a method, a path and a body in, an Answer out. No HTTP here."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from uuid import uuid4

import anyio.to_thread
from attrs import define, field

from agentrt.adapters.openai.answer import Answer, answered, json_answer, refused
from agentrt.adapters.openai.asking import Asked, Asking
from agentrt.adapters.openai.chat_answer import ChatAnswer
from agentrt.adapters.openai.chat_chunks import ChatHeader
from agentrt.adapters.openai.chat_request import read_chat_request
from agentrt.adapters.openai.fields import read_json
from agentrt.adapters.openai.input_items import page, read_query
from agentrt.adapters.openai.refusal import Refusal, refusal_of
from agentrt.adapters.openai.responses_answer import ResponsesAnswer
from agentrt.adapters.openai.responses_request import read_responses_request
from agentrt.adapters.openai.stored import Responses
from agentrt.adapters.openai.telling import Telling
from agentrt.errors import AgentrtError
from agentrt.parsers_families import LLAMA_PYTHONIC

if TYPE_CHECKING:
    from agentrt.engine import Engine

INLINE_BYTES = 1 << 16  # a body of this size is read in about 1 ms; more must not hold the loop up
_PREFIX = "/v1"
_WHY_NOT = {
    "embeddings": "this engine runs a language model, which makes no embeddings",
    "completions": "use /v1/chat/completions, or Engine.generate for text without a template",
}
Handler = Callable[[Any], Awaitable[Answer]]


@define(eq=False)
class Api:
    """Owns what is kept from one request to the next. Clients share it; `aclose` forgets it."""

    engine: Engine
    asking: Asking = field(init=False)
    responses: Responses = field(factory=Responses, init=False)
    _opened_s: int = field(factory=lambda: int(time.time()), init=False)

    @asking.default
    def _new_asking(self) -> Asking:
        return Asking(self.engine, self.engine.text)

    async def answer(self, method: str, path: str, body: bytes, query: str = "") -> Answer:
        """Never raises for what the caller or the engine did wrong: that becomes an error body."""
        try:
            return await self._routed(method, unquote(path).rstrip("/"), body, query)
        except Refusal as refusal:
            return refused(refusal)
        except AgentrtError as exc:
            return refused(refusal_of(exc))

    async def aclose(self) -> None:
        """Forget all conversations."""
        await self.asking.affinity.aclose()

    async def _routed(self, method: str, path: str, body: bytes, query: str) -> Answer:
        if not path.startswith(f"{_PREFIX}/"):
            raise _unknown(method, path, f"all paths begin with {_PREFIX}/")
        name, _, rest = path.removeprefix(f"{_PREFIX}/").partition("/")
        if name == "models":
            _check_method(method, path, "GET")
            return self._models(rest)
        if name == "chat" and rest == "completions":
            _check_method(method, path, "POST")
            return await self._chat(await _value(body))
        if name == "responses":
            return await self._responses(method, path, rest, body, query)
        known = "known are /v1/chat/completions, /v1/responses and /v1/models"
        raise _unknown(method, path, _WHY_NOT.get(name, known))

    # ---- models

    @property
    def model_ids(self) -> list[str]:
        """What requests may call the model: as the engine was given it, or as its file is."""
        names = [self.engine.model, PurePath(self.engine.model).name]
        return list(dict.fromkeys(name for name in names if name))

    def check_model(self, name: str) -> None:
        """Raise Refusal for a model that is not this engine's."""
        if name not in self.model_ids:
            known = " or ".join(map(repr, self.model_ids))
            raise Refusal(
                f"the model {name!r} does not exist: this engine runs {known}",
                "model",
                "model_not_found",
                status=404,
            )

    def _models(self, name: str) -> Answer:
        if name:
            self.check_model(name)
            return json_answer(self._model(name))
        return json_answer({"object": "list", "data": [self._model(self.model_ids[-1])]})

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._opened_s, "owned_by": "agentrt"}

    # ---- chat completions

    async def _chat(self, value: Any) -> Answer:
        request = read_chat_request(value)
        self.check_model(request.model)
        asked = await self.asking.ask(request.wanted)
        form = ChatAnswer(
            request=request,
            header=ChatHeader(
                id=f"chatcmpl-{uuid4().hex}", created_s=int(time.time()), model=request.model
            ),
            tokenizer=self.engine.tokenizer,
            num_prompt_tokens=len(asked.log.ids),
            tellings=self._tellings(asked),
        )
        return await answered(self.asking, asked, form, streams=request.streams)

    # ---- responses

    async def _responses(
        self, method: str, path: str, rest: str, body: bytes, query: str
    ) -> Answer:
        if not rest:
            _check_method(method, path, "POST")
            return await self._respond(await _value(body))
        response_id, _, part = rest.partition("/")
        if part == "input_items":
            _check_method(method, path, "GET")
            return json_answer(page(self.responses.get(response_id).items, query))
        if part:
            known = "known are /v1/responses, /v1/responses/ID and /v1/responses/ID/input_items"
            raise _unknown(method, path, known)
        _check_method(method, path, "GET", "DELETE")
        read_query(query)
        if method == "GET":
            return json_answer(self.responses.get(rest).response)
        self.responses.delete(rest)
        return json_answer({"id": rest, "object": "response", "deleted": True})

    async def _respond(self, value: Any) -> Answer:
        request = read_responses_request(value)
        self.check_model(request.model)
        response_id = f"resp_{uuid4().hex}"
        if request.previous_response_id is None:
            request = request.following((), response_id)
        else:
            previous = self.responses.get(request.previous_response_id, "previous_response_id")
            earlier = (*previous.items, *previous.response["output"])
            request = request.following(previous.messages, previous.affinity, earlier)
        asked = await self.asking.ask(request.wanted)
        form = ResponsesAnswer(
            id=response_id,
            request=request,
            created_s=time.time(),
            tokenizer=self.engine.tokenizer,
            num_prompt_tokens=len(asked.log.ids),
            tellings=self._tellings(asked),
            store=self.responses,
        )
        return await answered(self.asking, asked, form, streams=request.streams)

    def _tellings(self, asked: Asked) -> list[Telling]:
        chat = self.engine.text
        streams_calls = chat.call_format is not LLAMA_PYTHONIC
        return [Telling(streams_calls, chat.eos_token_ids) for _ in asked.choices.plans]


async def _value(body: bytes) -> Any:
    if len(body) <= INLINE_BYTES:
        return read_json(body)
    return await anyio.to_thread.run_sync(read_json, body)


def _check_method(method: str, path: str, *allowed: str) -> None:
    if method not in allowed:
        raise Refusal(
            f"{method} is not allowed for {path}: use {' or '.join(allowed)}",
            code="method_not_allowed",
            status=405,
        )


def _unknown(method: str, path: str, why: str) -> Refusal:
    return Refusal(f"unknown request URL: {method} {path}: {why}", code="unknown_url", status=404)
