"""agentrt: an in-process asyncio runtime for language-model agents.

Names are loaded on first use, so that `import agentrt` stays fast and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentrt.config import EngineConfig
    from agentrt.engine import Engine
    from agentrt.errors import AgentrtError
    from agentrt.session import Session
    from agentrt.tools import tool
    from agentrt.types import (
        Completion,
        Finished,
        GenerateOptions,
        Message,
        ReasoningDelta,
        Reply,
        TextDelta,
        ToolCall,
        ToolCallArguments,
        ToolCallDelta,
        ToolCallStarted,
        ToolResult,
        TurnFinished,
        Usage,
    )

__version__ = "0.1.0"
__all__ = [
    "AgentrtError",
    "Completion",
    "Engine",
    "EngineConfig",
    "Finished",
    "GenerateOptions",
    "Message",
    "ReasoningDelta",
    "Reply",
    "Session",
    "TextDelta",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallDelta",
    "ToolCallStarted",
    "ToolResult",
    "TurnFinished",
    "Usage",
    "tool",
]
_HOMES = {"AgentrtError": "errors", "Engine": "engine", "EngineConfig": "config"}
_HOMES |= {"Session": "session", "tool": "tools"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agentrt' has no attribute {name!r}")
    return getattr(import_module(f"agentrt.{_HOMES.get(name, 'types')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
