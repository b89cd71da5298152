"""Every name that the OpenTelemetry adapter uses, as in the GenAI conventions 0.1.0.

github.com/open-telemetry/semantic-conventions-genai; their status is "development".
"""

from __future__ import annotations

SCOPE = "agentrt"
SCHEMA_URL = "https://opentelemetry.io/schemas/gen-ai/0.1.0"

OPERATION, PROVIDER, MODEL = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"
AGENT, CONVERSATION = "gen_ai.agent.name", "gen_ai.conversation.id"
ERROR, MODALITY = "error.type", "gen_ai.token.modality"
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
SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
METRICS: dict[str, tuple[str, str, tuple[float, ...] | None]] = {
    "gen_ai.client.inference.duration": ("s", "Duration of a generation", SECONDS),
    "gen_ai.client.inference.time_to_first_chunk": ("s", "Time to the first token", FIRST),
    "gen_ai.client.inference.usage.input_tokens": ("{token}", "Prompt tokens", None),
    "gen_ai.client.inference.usage.output_tokens": ("{token}", "Generated tokens", None),
    "gen_ai.client.inference.usage.cache_read.input_tokens": (
        "{token}",
        "Prompt tokens whose KV was in the cache",
        None,
    ),
    "gen_ai.execute_tool.duration": ("s", "Duration of a tool", SECONDS),
    "gen_ai.invoke_agent.duration": ("s", "Duration of an agent's turn", SECONDS),
}
