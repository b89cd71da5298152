"""pydantic-ai's own Agent above an engine."""

import asyncio

import flight_desk
import pytest
from scripted import LONG, call_text, scripted

from agentrt import Engine
from agentrt.errors import RequestInvalid
from agentrt.grammar import choice

pydantic_ai = pytest.importorskip("pydantic_ai")
from pydantic import BaseModel  # noqa: E402
from pydantic_ai import Agent, ModelRetry, NativeOutput  # noqa: E402

from agentrt.adapters.pydantic_ai import AgentrtModel  # noqa: E402


class Flight(BaseModel):
    number: str
    seats: int


def find_flight(city: str) -> str:
    """Find a flight to a city."""
    if city == "Nowhere":
        raise ModelRetry("no such city")
    return f"AB12 to {city}"


def count_seats(number: str) -> int:
    """Count a flight's free seats."""
    return 3


async def test_an_agent_with_two_tools_and_a_typed_output(tokenizer, template):
    texts = [
        call_text("find_flight", '{"city": "Rome"}'),
        call_text("count_seats", '{"number": "AB12"}'),
        call_text("final_result", '{"number": "AB12", "seats": 3}'),
    ]
    async with scripted(tokenizer, template, texts, **LONG) as engine:
        model = AgentrtModel(engine)
        agent = Agent(model, tools=[find_flight, count_seats], output_type=Flight)
        done = await agent.run("Fly me to Rome.")
        stats = engine.stats()
    assert done.output == Flight(number="AB12", seats=3)
    usage = done.usage
    assert (usage.requests, usage.tool_calls) == (3, 2)
    assert usage.output_tokens == stats.output_tokens
    assert usage.input_tokens == stats.prompt_tokens
    assert usage.cache_read_tokens == stats.cached_tokens > 0
    assert usage.details["cached_device_tokens"] == stats.cached_tokens


async def test_each_step_goes_on_from_the_tokens_of_the_one_before(tokenizer, template):
    texts = [call_text("find_flight", '{"city": "Rome"}'), "AB12 flies there."]
    async with scripted(tokenizer, template, texts, **LONG) as engine:
        done = await Agent(AgentrtModel(engine), tools=[find_flight]).run("Rome?")
    first, second = [m for m in done.all_messages() if m.kind == "response"]
    known = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.cache_read_tokens == known - 1


async def test_a_tool_that_asks_for_another_try_is_called_again(tokenizer, template):
    texts = [
        call_text("find_flight", '{"city": "Nowhere"}'),
        call_text("find_flight", '{"city": "Rome"}'),
        "Found.",
    ]
    async with scripted(tokenizer, template, texts, **LONG) as engine:
        done = await Agent(AgentrtModel(engine), tools=[find_flight]).run("Somewhere")
    assert done.output == "Found."
    said = "".join(map(str, done.all_messages()))
    assert "no such city" in said


async def test_a_typed_output_without_a_tool_is_held_by_its_schema(tokenizer, template):
    async with scripted(tokenizer, template, ['{"number": "AB12", "seats": 3}'], **LONG) as engine:
        agent = Agent(
            AgentrtModel(engine, settings={"max_tokens": 60}), output_type=NativeOutput(Flight)
        )
        done = await agent.run("Which?")
    assert done.output == Flight(number="AB12", seats=3)


async def test_text_streams(tokenizer, template):
    async with scripted(tokenizer, template, ["One two three."], **LONG) as engine:
        async with Agent(AgentrtModel(engine)).run_stream("Count") as result:
            texts = [text async for text in result.stream_text(debounce_by=None)]
        assert texts[-1] == "One two three."
        assert all(texts[-1].startswith(text) for text in texts)
        assert result.usage.output_tokens == engine.stats().output_tokens


async def test_leaving_a_stream_cancels_the_request(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 200], **LONG) as engine:
        async with Agent(AgentrtModel(engine)).run_stream("Go on") as result:
            async for _ in result.stream_text(debounce_by=None):
                engine.gate.close()
                break
        engine.gate.open()
        assert await engine.leased_blocks() == 0
        assert engine.stats().cancelled == 1


async def test_what_the_wire_cannot_say(tokenizer, template):
    """A grammar, a session's name, and the engine behind the model."""
    async with scripted(tokenizer, template, ["yes", "and so"], **LONG) as engine:
        model = AgentrtModel(engine)
        settings = {"agentrt_grammar": choice(["yes", "no"]), "agentrt_session": "s1"}
        done = await Agent(model, model_settings=settings).run("Is it so?")
        assert done.output == "yes"
        assert model.engine is engine
        forks = await engine.session(system="x").fork(2)
        assert len(forks) == 2
        with pytest.raises(RequestInvalid, match="a grammar excludes tools"):
            await Agent(model, tools=[find_flight], model_settings=settings).run("?")
        with pytest.raises(RequestInvalid, match="reads text, not ImageUrl"):
            await Agent(model).run([pydantic_ai.ImageUrl("http://x/y.png")])


async def test_agents_run_side_by_side(tokenizer, template):
    async with scripted(tokenizer, template, ["Done."] * 4, **LONG) as engine:
        agent = Agent(AgentrtModel(engine))
        done = await asyncio.gather(*(agent.run(f"I am {number}") for number in range(4)))
    assert [each.output for each in done] == ["Done."] * 4


@pytest.mark.parametrize(
    ("output", "last"),
    [(NativeOutput(flight_desk.Free), "none"), (flight_desk.Free, "final_result")],
)
async def test_two_tools_and_a_typed_output_with_the_real_model(output, last):
    """SmolLM2 copies what the first tool said into the call of the second, and both into the
    output, which its schema holds, or which is a tool's call itself."""

    def settings(context):
        num_done = sum(message.kind == "response" for message in context.messages)
        choice = [*flight_desk.TOOLS, last][num_done]
        return {"max_tokens": 60, "parallel_tool_calls": False, "tool_choice": choice}

    async with Engine() as engine:
        agent = Agent(AgentrtModel(engine), tools=[*flight_desk.TOOLS.values()], output_type=output)
        done = await agent.run(flight_desk.QUESTION, model_settings=settings)
    said = [part for message in done.all_messages() for part in message.parts]
    calls = [(p.tool_name, p.args_as_dict()) for p in said if p.part_kind == "tool-call"]
    assert calls[:2] == flight_desk.CALLS
    returned = [p.content for p in said if p.part_kind == "tool-return"]
    assert returned[:2] == flight_desk.RESULTS
    assert done.output == flight_desk.ANSWER
    assert (done.usage.requests, done.usage.tool_calls) == (3, 2)
    assert done.usage.cache_read_tokens > 0
