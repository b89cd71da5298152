"""Engines on a fake device whose texts are given: what a model says is the test's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fakes import FakeEngine

if TYPE_CHECKING:
    from agentrt.request import Request
    from agentrt.template import ChatTemplate
    from agentrt.tokenizer import Tokenizer

# For frameworks, whose prompts are long where a byte is a token.
LONG = {"num_blocks": 8000, "context": 20_000, "step_tokens": 2048}


class Script:
    """Answers for a FakeRunner: each new request says the next text, then ends its turn."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = iter(texts)
        self._ids: dict[str, list[int]] = {}

    def __call__(self, request: Request, num_output_tokens: int) -> int:
        if request.id not in self._ids:
            text = next(self._texts)
            self._ids[request.id] = [*self._tokenizer.encode(text), *self._tokenizer.eos_token_ids]
        ids = self._ids[request.id]
        return ids[min(num_output_tokens, len(ids) - 1)]  # a draft may go beyond the end


def scripted(
    tokenizer: Tokenizer, template: ChatTemplate, texts: Sequence[str], **config: Any
) -> FakeEngine:
    """An engine that answers with these texts, one a request."""
    sizes = {"num_blocks": 2000, "context": 6000, "step_tokens": 512}
    engine = FakeEngine(tokenizer=tokenizer, template=template, checked=False, **(sizes | config))
    engine.runner.script = Script(tokenizer, texts)
    return engine


def call_text(name: str, arguments: str = "{}") -> str:
    """A call in the form of Hermes, which is that of the fake engine's template."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
