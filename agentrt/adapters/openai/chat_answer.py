"""The answer to one Chat Completions request, built up batch by batch."""

from __future__ import annotations

from typing import Any

from attrs import define, field

from agentrt.adapters.openai.answer import encoded
from agentrt.adapters.openai.chat_chunks import (
    ChatHeader,
    ChoiceChunks,
    WholeChoice,
    chat_usage,
    whole_completion,
)
from agentrt.adapters.openai.chat_request import ChatRequest
from agentrt.adapters.openai.choices import Batch
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.telling import Telling
from agentrt.adapters.openai.tokens import Tally, num_cached_tokens
from agentrt.tokenizer import Tokenizer


@define(eq=False, kw_only=True)
class ChatAnswer:
    """State: each choice's telling and chunks, and where the answer is not streamed, their sum."""

    request: ChatRequest
    header: ChatHeader
    tokenizer: Tokenizer
    num_prompt_tokens: int
    tellings: list[Telling]
    _chunks: list[ChoiceChunks] = field(init=False)
    _wholes: list[WholeChoice] = field(init=False)
    _num_cached_tokens: int = field(default=0, init=False)

    @_chunks.default
    def _new_chunks(self) -> list[ChoiceChunks]:
        shows = self.request.wanted.options.top_logprobs is not None
        return [ChoiceChunks(i, self.tokenizer, shows) for i in range(len(self.tellings))]

    @_wholes.default
    def _new_wholes(self) -> list[WholeChoice]:
        return [WholeChoice(i) for i in range(len(self.tellings))]

    def begin(self) -> list[dict[str, Any]]:
        return []

    def push(self, batch: Batch) -> list[dict[str, Any]]:
        if batch.index == 0 and batch.completion is not None:
            self._num_cached_tokens = num_cached_tokens(batch.completion)
        said = self.tellings[batch.index].push(batch)
        entries = self._chunks[batch.index].entries(said)
        if not self.request.streams:
            for entry in entries:
                self._wholes[batch.index].add(entry)
            return []
        chunks = [self.header.chunk([entry]) for entry in entries]
        if self.request.includes_usage:  # in all chunks, and in the last one not null
            chunks = [{**chunk, "usage": None} for chunk in chunks]
        return chunks

    def end(self) -> list[dict[str, Any]]:
        if not self.request.includes_usage:
            return []
        return [{**self.header.chunk([]), "usage": chat_usage(self._tally())}]

    def failed(self, refusal: Refusal) -> list[dict[str, Any]]:
        return [refusal.body]

    def encode(self, event: dict[str, Any]) -> bytes:
        return b"data: " + encoded(event) + b"\n\n"

    @property
    def last_bytes(self) -> bytes:
        return b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        usage = chat_usage(self._tally())
        return whole_completion(self.header, self._wholes, usage, self.request.metadata)

    def _tally(self) -> Tally:
        thoughts = (telling.thoughts for telling in self.tellings)
        return Tally(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            output_tokens=sum(telling.num_tokens for telling in self.tellings),
            reasoning_tokens=sum(len(self.tokenizer.encode(text)) for text in thoughts if text),
        )
