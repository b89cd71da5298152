"""The `llm` plugin: `llm -m agentrt/smollm2-135m "..."`, with tools, schemas and conversations.

A prompt opens the engine and closes it again, which takes half a second; what the KV cache's disk
tier keeps outlives that. Programs hold it open: `with model.opened(): model.prompt(...)`.
`-o tool_choice once` is one call after each prompt, and then an answer in text: small models call
again and again if they may. `-o session NAME` and `-o grammar ...` reach what no other model of
`llm` has; the response's JSON has the cached tokens by tier.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agentrt.errors import MissingExtra, RequestInvalid

try:
    import llm
    from llm import parts
    from pydantic import Field
except ImportError as exc:
    raise MissingExtra('this needs llm: pip install "agentrt[llm]"') from exc

if TYPE_CHECKING:
    from agentrt.adapters.blocking import Bridge
    from agentrt.adapters.openai.wanted import Wanted
    from agentrt.types import Completion, Message

_PREFIX = "agentrt/"
_SAMPLING = ("temperature", "top_p", "top_k", "seed")


@llm.hookimpl
def register_models(register: Any) -> None:
    """Our registered names. Other models: `AgentrtModel(path)` in a program."""
    from agentrt.registry import REGISTERED

    for name in REGISTERED:
        register(AgentrtModel(name))


class AgentrtModel(llm.Model):
    """A model that runs in this process."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    class Options(llm.Options):
        """Those of GenerateOptions that people set, and what no wire can say."""

        max_tokens: int | None = Field(default=None, ge=1, description="the longest answer")
        temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
        top_p: float = Field(default=1.0, gt=0, le=1)
        top_k: int = Field(default=0, ge=0, description="0 is all")
        seed: int | None = Field(default=None, ge=0)
        stop: str | None = Field(default=None, description="a text that ends the answer")
        tool_choice: str = Field(
            default="auto",
            description="auto, none, required, a tool's name, or once: a call, then text",
        )
        session: str | None = Field(default=None, description="a name for the conversation")
        grammar: str | None = Field(default=None, description="of agentrt.grammar")

    def __init__(self, model: str) -> None:
        self.model_id = _PREFIX + model
        self._model = model
        self._bridge: Bridge | None = None

    @contextmanager
    def opened(self) -> Iterator[Bridge]:
        """Keep the engine open for the prompts of the block; `.engine` of what this gives is it."""
        from agentrt.adapters.blocking import blocking_engine

        if self._bridge is not None:
            yield self._bridge
            return
        with blocking_engine(self._model) as bridge:
            self._bridge = bridge
            try:
                yield bridge
            finally:
                self._bridge = None

    def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any
    ) -> Iterator[str | Any]:
        from agentrt.adapters import answers as said

        with self.opened() as bridge:
            asking, request = said.Answers(bridge.engine), _wanted(prompt)
            written: dict[int, tuple[said.CallBegun, str]] = {}
            for each in bridge.iterate(lambda: asking.stream(request)):
                if isinstance(each, said.Text):
                    yield parts.StreamEvent(type="text", chunk=each.text)
                elif isinstance(each, said.Thought):
                    yield parts.StreamEvent(type="reasoning", chunk=each.text)
                elif isinstance(each, said.CallBegun):
                    written[each.number] = each, ""
                    yield _call_event("tool_call_name", each.name, each.id)
                elif isinstance(each, said.CallText):
                    begun, text = written[each.number]
                    written[each.number] = begun, text + each.text
                    yield _call_event("tool_call_args", each.text, begun.id)
                elif isinstance(each, said.CallEnded):
                    begun, text = written[each.number]
                    call = llm.ToolCall(begun.name, json.loads(text), tool_call_id=begun.id)
                    response.add_tool_call(call)
                elif isinstance(each, said.Ended) and each.completion is not None:
                    _note(response, each.completion)


def _call_event(kind: str, text: str, call_id: str) -> Any:
    return parts.StreamEvent(type=kind, chunk=text, tool_call_id=call_id)


def _note(response: Any, completion: Completion) -> None:
    usage = completion.usage
    response.set_usage(input=usage.prompt_tokens, output=usage.output_tokens)
    response.response_json = {
        "finish_reason": completion.finish_reason,
        "cached_tokens": dict(usage.cached_tokens),
        "ttft_s": usage.ttft_s,
    }


def _wanted(prompt: Any) -> Wanted:
    from agentrt.adapters.answers import offered_tool, wanted
    from agentrt.types import GenerateOptions

    options = prompt.options
    return wanted(
        [message for each in prompt.messages for message in _messages(each)],
        tools=[offered_tool(t.name, t.description, t.input_schema) for t in prompt.tools],
        choice=options.tool_choice if prompt.tools else "auto",
        schema=prompt.schema,
        options=GenerateOptions(
            stop=() if options.stop is None else (options.stop,),
            **{name: getattr(options, name) for name in _SAMPLING},
        ),
        max_tokens=options.max_tokens,
        session=options.session,
        grammar=options.grammar,
    )


def _messages(message: Any) -> Iterator[Message]:
    """Ours of one of llm's: each tool's result is a message of its own."""
    from agentrt.types import Message, ToolCall

    text, calls = "", []
    for part in message.parts:
        if isinstance(part, parts.TextPart):
            text += part.text
        elif isinstance(part, parts.ToolCallPart):
            calls.append(ToolCall(part.tool_call_id or "", part.name, part.arguments))
        elif isinstance(part, parts.ToolResultPart):
            content = part.output if part.exception is None else f"Error: {part.exception}"
            call_id = part.tool_call_id
            yield Message(role="tool", content=content, name=part.name, tool_call_id=call_id)
        elif not isinstance(part, parts.ReasoningPart):  # templates leave old thoughts out
            raise RequestInvalid(f"the model reads text, not {type(part).__name__}")
    if text or calls:
        yield Message(role=message.role, content=text, tool_calls=tuple(calls))
