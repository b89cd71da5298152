"""openai-agents: an engine as the `Model` of its agents, in the format of OpenAI's Responses.

    Runner.run(Agent(name="desk", model=AgentrtModel(engine), tools=[...]), "...")

It is the SDK's own model above `engine.openai()`: nothing leaves the process. Cached tokens are in
the usage's `input_tokens_details`; `session` names the conversation, whose KV is kept for it while
tools run; `model.engine` is the engine, for sessions and forks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentrt.errors import MissingExtra

try:
    from agents import ModelProvider, OpenAIResponsesModel
    from agents.models import get_default_model_settings
except ImportError as exc:
    raise MissingExtra('this needs openai-agents: pip install "agentrt[openai-agents]"') from exc

if TYPE_CHECKING:
    from agents import ModelSettings

    from agentrt.engine import Engine

_SESSION = "prompt_cache_key"


class AgentrtModel(OpenAIResponsesModel):
    """The model of an open engine. Close it, or leave the engine, when you are done."""

    def __init__(self, engine: Engine, *, session: str | None = None) -> None:
        super().__init__(model=engine.model, openai_client=engine.openai())
        self.engine = engine
        self.session = session

    async def close(self) -> None:
        """Forget the conversations."""
        await self._get_client().close()

    async def get_response(
        self,
        system_instructions: Any,
        input: Any,
        model_settings: ModelSettings,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """A whole answer."""
        settings = self._ours(model_settings)
        return await super().get_response(system_instructions, input, settings, *rest, **more)

    def stream_response(
        self,
        system_instructions: Any,
        input: Any,
        model_settings: ModelSettings,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """The same, as events."""
        settings = self._ours(model_settings)
        return super().stream_response(system_instructions, input, settings, *rest, **more)

    def _ours(self, settings: ModelSettings) -> ModelSettings:
        """The settings with the conversation's name, and without what nobody asked for: an agent
        that names no model gets the defaults of OpenAI's newest one."""
        usual = get_default_model_settings()
        if (settings.verbosity, settings.reasoning) == (usual.verbosity, usual.reasoning):
            settings = replace(settings, verbosity=None, reasoning=None)
        if self.session is None:
            return settings
        return replace(settings, extra_args={_SESSION: self.session, **(settings.extra_args or {})})


class AgentrtProvider(ModelProvider):
    """Gives every agent of a run the engine's model: `RunConfig(model_provider=...)`."""

    def __init__(self, engine: Engine) -> None:
        self._model = AgentrtModel(engine)

    def get_model(self, model_name: str | None) -> AgentrtModel:
        """The engine's model, whatever it is called."""
        return self._model
