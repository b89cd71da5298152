"""Every name that the OpenTelemetry adapter uses: those of the GenAI conventions 1.41.1.

That is the last version which was released: the package opentelemetry-semantic-conventions has its
names. Their successor (github.com/open-telemetry/semantic-conventions-genai) renames most metrics,
and had no release in October 2026. The status of all of them is "development".
"""

from __future__ import annotations

SCOPE = "agentrt"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.1"

OPERATION, PROVIDER, MODEL = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"
AGENT, CONVERSATION = "gen_ai.agent.name", "gen_ai.conversation.id"
ERROR, TOKEN_TYPE = "error.type", "gen_ai.token.type"  # "input" or "output"
TOOL_NAME, TOOL_ID, TOOL_TYPE = "gen_ai.tool.name", "gen_ai.tool.call.id", "gen_ai.tool.type"
TOOL_ARGUMENTS, TOOL_RESULT = "gen_ai.tool.call.arguments", "gen_ai.tool.call.result"
INPUT, OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"
# GenerateOptions field -> attribute of the request.
REQUEST = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
}
RESPONSE_ID, FINISH = "gen_ai.response.id", "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
USAGE_IN, USAGE_OUT = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
USAGE_CACHED = "gen_ai.usage.cache_read.input_tokens"
USAGE_TIER = "agentrt.usage.cache_read.{tier}.input_tokens"  # ours: the conventions know no tiers
# Metric -> (unit, description, boundaries of a histogram's buckets or None for a counter).
SECONDS = tuple(0.01 * 2**n for n in range(14))
TURN_SECONDS = tuple(0.1 * 2**n for n in range(13))
TOKENS = tuple(float(4**n) for n in range(14))
DURATION = "gen_ai.client.operation.duration"
FIRST_CHUNK_AFTER = "gen_ai.client.operation.time_to_first_chunk"
TOKEN_USAGE = "gen_ai.client.token.usage"
CACHED_TOKENS = "agentrt.client.cache_read.input_tokens"  # ours: a part of the input tokens
TOOL_DURATION, TURN_DURATION = "gen_ai.execute_tool.duration", "gen_ai.invoke_agent.duration"
METRICS: dict[str, tuple[str, str, tuple[float, ...] | None]] = {
    DURATION: ("s", "Duration of a generation", SECONDS),
    FIRST_CHUNK_AFTER: ("s", "Time to the first token", SECONDS),
    TOKEN_USAGE: ("{token}", "Prompt tokens and generated tokens of a generation", TOKENS),
    CACHED_TOKENS: ("{token}", "Prompt tokens whose KV was in the cache", None),
    TOOL_DURATION: ("s", "Duration of a tool", SECONDS),
    TURN_DURATION: ("s", "Duration of an agent's turn", TURN_SECONDS),
}
# In the successor, under these names, and in no release yet.
UNRELEASED = {TOOL_DURATION, TURN_DURATION}
