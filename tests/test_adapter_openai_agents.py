"""openai-agents' own Runner above an engine: tools, a typed output, and a handoff."""

import flight_desk
import pytest
from attrs import define
from scripted import LONG, call_text, scripted

from agentrt import Engine

agents = pytest.importorskip("agents")
from agents import (  # noqa: E402
    Agent,
    ModelSettings,
    RunConfig,
    RunContextWrapper,
    Runner,
    function_tool,
    handoff,
)
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


@define
class Desk:
    """What the agents know together: how far they are."""

    flight: str | None = None
    seats: str | None = None


@function_tool(is_enabled=lambda context, _: context.context.flight is None)
def look_flight_up(context: RunContextWrapper[Desk], city: flight_desk.City) -> str:
    """Find the number of the flight to a city."""
    context.context.flight = flight_desk.find_flight(city)
    return context.context.flight


@function_tool(is_enabled=lambda context, _: context.context.seats is None)
def look_seats_up(context: RunContextWrapper[Desk], flight_number: flight_desk.Number) -> str:
    """Count the free seats of a flight."""
    context.context.seats = flight_desk.count_seats(flight_number)
    return context.context.seats


class Passed(BaseModel):
    flight_number: flight_desk.Number


async def test_a_handoff_between_two_tools_with_the_real_model():
    """One agent finds the flight's number, and writes it into the call that hands over; the other
    one counts the seats of that flight, and gives a typed output."""
    passed, base = [], {"temperature": 0.0, "max_tokens": 60, "parallel_tool_calls": False}

    async def note(_, data):
        passed.append(data.flight_number)

    counter = Agent(
        name="seats",
        instructions="You count the free seats of flights.",
        tools=[look_seats_up],
        output_type=flight_desk.Free,
        model_settings=ModelSettings(tool_choice="required", **base),  # of the first turn alone
    )
    to_counter = handoff(
        counter,
        input_type=Passed,
        on_handoff=note,
        is_enabled=lambda context, _: context.context.flight is not None,
    )
    finder = Agent(
        name="flights",
        instructions="You find flights.",
        tools=[look_flight_up],
        handoffs=[to_counter],
        model_settings=ModelSettings(tool_choice="required", **base),
        reset_tool_choice=False,
    )
    desk = Desk()
    async with Engine() as engine:
        provider = AgentrtProvider(engine)
        config = RunConfig(tracing_disabled=True, model_provider=provider)
        done = await Runner.run(
            finder, flight_desk.QUESTION, run_config=config, context=desk, max_turns=4
        )
        await provider.get_model(None).close()
    assert [desk.flight, desk.seats] == flight_desk.RESULTS
    assert passed == [flight_desk.FLIGHT]
    assert done.last_agent is counter
    assert done.final_output == flight_desk.ANSWER
