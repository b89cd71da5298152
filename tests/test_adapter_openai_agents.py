"""openai-agents' own Runner above an engine: tools, a typed output, and a handoff."""

from typing import Literal

import pytest
from scripted import LONG, call_text, scripted

from agentrt import Engine

agents = pytest.importorskip("agents")
from agents import Agent, ModelSettings, RunConfig, Runner, function_tool  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from agentrt.adapters.openai_agents import AgentrtModel, AgentrtProvider  # noqa: E402

GREEDY = ModelSettings(temperature=0.0)  # OpenAI's API samples unless it is told not to
QUIET = RunConfig(tracing_disabled=True, model_settings=GREEDY)


@function_tool
def find_flight(city: str) -> str:
    """Find a flight to a city."""
    return f"AB12 to {city}"


@function_tool
def count_seats(number: str) -> int:
    """Count the free seats of a flight."""
    return 3


class Flight(BaseModel):
    number: str
    seats: int


async def test_two_tools_and_a_typed_output(tokenizer, template):
    texts = [
        call_text("find_flight", '{"city": "Rome"}'),
        call_text("count_seats", '{"number": "AB12"}'),
        '{"number": "AB12", "seats": 3}',
    ]
    async with scripted(tokenizer, template, texts, **LONG) as engine:
        model = AgentrtModel(engine, session="s1")
        agent = Agent(
            name="desk", model=model, tools=[find_flight, count_seats], output_type=Flight
        )
        done = await Runner.run(agent, "Fly me to Rome.", run_config=QUIET)
        stats = engine.stats()
        await model.close()
    assert done.final_output == Flight(number="AB12", seats=3)
    usage = done.context_wrapper.usage
    assert (usage.requests, usage.output_tokens) == (3, stats.output_tokens)
    assert usage.input_tokens == stats.prompt_tokens
    assert usage.input_tokens_details.cached_tokens == stats.cached_tokens > 0


async def test_a_handoff(tokenizer, template):
    texts = [
        call_text("transfer_to_refunds", "{}"),
        call_text("find_flight", '{"city": "Oslo"}'),
        "Refunded.",
    ]
    async with scripted(tokenizer, template, texts, **LONG) as engine:
        provider = AgentrtProvider(engine)
        refunds = Agent(name="refunds", instructions="You refund.", tools=[find_flight])
        desk = Agent(name="desk", instructions="You greet.", handoffs=[refunds])
        config = RunConfig(tracing_disabled=True, model_provider=provider, model_settings=GREEDY)
        done = await Runner.run(desk, "I want my money back.", run_config=config)
        await provider.get_model(None).close()
    assert done.final_output == "Refunded."
    assert done.last_agent is refunds


async def test_events_stream(tokenizer, template):
    async with scripted(tokenizer, template, ["One two."], **LONG) as engine:
        model = AgentrtModel(engine)
        run = Runner.run_streamed(Agent(name="desk", model=model), "Count", run_config=QUIET)
        deltas = [
            event.data.delta
            async for event in run.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        await model.close()
    assert "".join(deltas) == run.final_output == "One two."


async def test_with_the_real_model():
    """SmolLM2, one call demanded: the grammar makes it one of the tool's."""

    @function_tool
    def get_reservation(reservation_id: Literal["ZX12AB", "4BMN53"]) -> str:
        """Look up a reservation by its id."""
        return f"Reservation {reservation_id} flies from Denver to Miami on May 20."

    async with Engine() as engine:
        model = AgentrtModel(engine)
        settings = ModelSettings(
            tool_choice="required", temperature=0.0, max_tokens=48, parallel_tool_calls=False
        )
        agent = Agent(name="desk", model=model, tools=[get_reservation], model_settings=settings)
        done = await Runner.run(agent, "Please look up reservation ZX12AB.", run_config=QUIET)
        await model.close()
    outputs = [item.output for item in done.new_items if item.type == "tool_call_output_item"]
    assert outputs == ["Reservation ZX12AB flies from Denver to Miami on May 20."]
    assert "May 20" in done.final_output
