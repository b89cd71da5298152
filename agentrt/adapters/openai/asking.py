"""From what is wanted to choices that are being generated: guards, the prompt, and its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio.to_thread
from attrs import define, evolve, field

from agentrt.adapters.openai.affinity import Affinity, Conversation, conversation_of
from agentrt.adapters.openai.choices import Choices, Plan
from agentrt.adapters.openai.messages import as_written
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.wanted import Wanted
from agentrt.errors import GuardStopped
from agentrt.guards import Source, guarded
from agentrt.screen import Screen
from agentrt.submission import samples
from agentrt.token_log import INLINE_CHARACTERS, TokenLog

if TYPE_CHECKING:
    from agentrt.chat import Chat
    from agentrt.engine import Engine
    from agentrt.types import Completion, Message


@define(eq=False)
class Asked:
    """A request on its way: its choices, and the log that they go on from."""

    conversation: Conversation
    log: TokenLog
    choices: Choices


@define(eq=False)
class Asking:
    """Asks one engine. Owns the conversations that came before."""

    engine: Engine
    chat: Chat
    affinity: Affinity = field(init=False)

    @affinity.default
    def _new(self) -> Affinity:
        return Affinity(self.engine, self.engine.tokenizer)

    async def ask(self, wanted: Wanted) -> Asked:
        """Start the choices. Raises what `Engine.stream` raises, or Refusal."""
        if wanted.options.top_logprobs is not None and self.engine.output_guards:
            raise Refusal(
                "logprobs would tell what the engine's output guards withhold", "logprobs"
            )
        messages = await self._guarded(wanted.messages)
        rendered = self.chat.render(as_written(messages, self.chat.call_format), wanted.tools)
        conversation = conversation_of(wanted.affinity, messages)
        log = await self.affinity.log_of(conversation, rendered)
        rewrites = log.rewrites
        if len(rendered) - len(log.text) <= INLINE_CHARACTERS:
            log.update(rendered)
        else:
            await anyio.to_thread.run_sync(log.update, rendered)
        options = wanted.fitted(self.chat, rendered, self._room_tokens(len(log.ids)))
        ids = await self.chat.prompt_ids(log.ids)
        plans = [
            Plan(
                ids=ids,
                options=one,
                parser=self.chat.parser(rendered, wanted.callable_tools, wanted.num_calls),
                screen=Screen(self.engine.output_guards) if self.engine.output_guards else None,
                is_rewritten=log.rewrites > rewrites,
            )
            for one in samples(options)
        ]
        return Asked(conversation, log, await Choices(self.engine, plans).start())

    async def keep(
        self, asked: Asked, completion: Completion, tool_names: Sequence[str] = ()
    ) -> None:
        """Note what the model wrote: the conversation goes on from there."""
        log, ids = asked.log.copy(), completion.token_ids
        ended = ids[-1] if ids and ids[-1] in self.chat.eos_token_ids else None
        log.append_generated(ids, self.chat.shown(completion.text, ended))
        await self.affinity.keep(asked.conversation, log, tool_names)

    def _room_tokens(self, num_prompt_tokens: int) -> int:
        """The longest output that fits the context and the KV pool behind this prompt."""
        resolved = self.engine.resolved
        pool_tokens = resolved.pool_tokens - resolved.block_tokens  # a copied block needs a spare
        return min(resolved.max_context_tokens, pool_tokens) - num_prompt_tokens

    async def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        """What the guards let the model read. They are asked about all of it: it comes from outside
        every time."""
        guards, shown = self.engine.input_guards, list(messages)
        for index, message in enumerate(messages):
            if not guards or message.role not in ("user", "tool"):
                continue
            source: Source = "user" if message.role == "user" else "tool"
            text, stopped = await guarded(message.content, guards, source)
            if stopped is not None and source == "user":
                raise GuardStopped(f"a guard stopped the prompt: {stopped.reason}")
            if stopped is not None:
                text = f"Error: the result was withheld: {stopped.reason}"
            shown[index] = evolve(message, content=text)
        return shown
