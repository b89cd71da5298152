"""The exception tree. Each leaf is named by what the caller can do about it.

AgentrtError
├── ConfigError (ValueError)        change the named EngineConfig or GenerateOptions field
├── ModelError (ValueError)
│   ├── ModelNotFound               give a path, a registered name, or reach the registry once
│   ├── ModelUnsupported            the architecture or an option of its config is missing here
│   └── WeightsInvalid              the file is truncated or corrupt, or does not fit its config
├── RequestInvalid (ValueError)     mend the request; the message names the argument
│   ├── PromptTooLong               shorten the prompt, or raise the limit that the message names
│   ├── TemplateError               the chat template refused the messages
│   ├── GrammarInvalid              the schema or grammar cannot be compiled
│   └── OutputInvalid               the answer is not what `output` wants: maybe it was cut off
├── ToolInvalid (TypeError)         the function cannot be a tool; the message names the parameter
├── Overloaded (RuntimeError)       wait, or raise the limit that the message names
├── GuardStopped (RuntimeError)     a guard stopped it; the message has its reason
├── SessionBusy (RuntimeError)      one turn at a time: await the running one, or fork the session
├── EngineClosed (RuntimeError)     open a new engine
├── EngineFailed (RuntimeError)     the step thread died; `__cause__` says why
├── TierUnavailable (OSError)       do what the message says about the cache folder, or do without
├── CacheCorrupt (RuntimeError)     an invariant of the KV cache is broken: a bug, please report it
└── MissingExtra (ImportError)      install the extra that the message names
"""


class AgentrtError(Exception):
    """Root of every error that agentrt raises on purpose."""


class ConfigError(AgentrtError, ValueError):
    """A setting is out of range or cannot be used here."""


class ModelError(AgentrtError, ValueError):
    """A model cannot be loaded."""


class ModelNotFound(ModelError):
    """No model is at that place, and it could not be fetched."""


class ModelUnsupported(ModelError):
    """The architecture, or an option that its config sets, is not implemented."""


class WeightsInvalid(ModelError):
    """A weight file is truncated or corrupt, or its tensors do not fit the config."""


class RequestInvalid(AgentrtError, ValueError):
    """A request can never be served as it is."""


class PromptTooLong(RequestInvalid):
    """The prompt and its output can never fit the context or the KV pool."""


class TemplateError(RequestInvalid):
    """The chat template cannot render these messages."""


class GrammarInvalid(RequestInvalid):
    """A schema or grammar cannot be compiled."""


class OutputInvalid(RequestInvalid):
    """An answer is not the value that `output` asked for."""


class ToolInvalid(AgentrtError, TypeError):
    """A function cannot be offered as a tool."""


class Overloaded(AgentrtError, RuntimeError):
    """A queue is full."""


class GuardStopped(AgentrtError, RuntimeError):
    """A guard stopped the prompt or the output."""


class SessionBusy(AgentrtError, RuntimeError):
    """The session already runs a turn."""


class EngineClosed(AgentrtError, RuntimeError):
    """The engine was closed before or during the call."""


class EngineFailed(AgentrtError, RuntimeError):
    """The engine's step thread died; the cause is chained."""


class TierUnavailable(AgentrtError, OSError):
    """A tier of the cache cannot be used here; the engine runs on without it."""


class CacheCorrupt(AgentrtError, RuntimeError):
    """An invariant of the KV cache does not hold."""


class MissingExtra(AgentrtError, ImportError):
    """An optional dependency is not installed."""
