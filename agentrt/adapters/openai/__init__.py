"""OpenAI's API in this process: clients of `openai`, and frameworks above it, talk to an engine.

`client` is what `Engine.openai()` returns; `agentrt.adapters.openai.server` is the same on a port.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agentrt.adapters.openai.api import Api
from agentrt.adapters.openai.transport import transport
from agentrt.errors import MissingExtra

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from agentrt.engine import Engine

__all__ = ["Api", "client", "transport"]
_BASE_URL = "http://agentrt/v1"


def client(engine: Engine, **settings: Any) -> AsyncOpenAI:
    """A client whose requests the engine answers. Close it, as any, when you are done with it."""
    openai = _imported("openai")
    http = _http_of(openai)
    made: AsyncOpenAI = openai.AsyncOpenAI(
        **{
            "api_key": "in-process",
            "base_url": _BASE_URL,
            "http_client": http.AsyncClient(transport=transport(http, Api(engine))),
            **settings,
        }
    )
    return made


def _http_of(openai: ModuleType) -> ModuleType:
    """The library that this version of openai speaks HTTP with."""
    major = int(openai.__version__.split(".")[0])
    return _imported("httpx2" if major >= 3 else "httpx")


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as exc:
        raise MissingExtra(f"engine.openai() needs {name}: pip install 'agentrt[openai]'") from exc
