"""smolagents' own ToolCallingAgent above an engine."""

import flight_desk
import pytest
from scripted import call_text, scripted

from agentrt.adapters.blocking import blocking_engine
from agentrt.errors import RequestInvalid
from agentrt.grammar import choice

smolagents = pytest.importorskip("smolagents")
from smolagents import ChatMessage, MessageRole, Tool, ToolCallingAgent  # noqa: E402

from agentrt.adapters.smolagents import AgentrtModel  # noqa: E402


class FindFlight(Tool):
    name = "find_flight"
    description = "Find a flight to a city."
    inputs = {"city": {"type": "string", "description": "where to", "enum": ["Rome", "Oslo"]}}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"AB12 to {city}"


class CountSeats(Tool):
    name = "count_seats"
    description = "Count the free seats of a flight."
    inputs = {"number": {"type": "string", "description": "of the flight"}}  # noqa: RUF012
    output_type = "integer"

    def forward(self, number: str) -> int:
        return 3


def blocking_script(tokenizer, template, texts):
    sizes = {"num_blocks": 20_000, "context": 60_000, "step_tokens": 4096}
    return blocking_engine(scripted(tokenizer, template, texts, **sizes))


@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_calls_two_tools_and_answers(tokenizer, template, streams):
    texts = [
        call_text("find_flight", '{"city": "Rome"}'),
        call_text("count_seats", '{"number": "AB12"}'),
        call_text("final_answer", '{"answer": "3 seats on AB12"}'),
    ]
    with blocking_script(tokenizer, template, texts) as bridge:
        agent = ToolCallingAgent(
            tools=[FindFlight(), CountSeats()],
            model=AgentrtModel(bridge, max_tokens=400),
            stream_outputs=streams,
            verbosity_level=0,
        )
        done = agent.run("Fly me to Rome.", return_full_result=True)
        stats = bridge.engine.stats()
    assert done.output == "3 seats on AB12"
    assert done.token_usage.input_tokens == stats.prompt_tokens
    assert done.token_usage.output_tokens == stats.output_tokens
    assert stats.cached_tokens > 0.6 * stats.prompt_tokens  # the later steps begin as the first
    called = [call.name for step in agent.memory.steps[1:] for call in step.tool_calls]
    assert called == ["find_flight", "count_seats", "final_answer"]


def test_what_the_wire_cannot_say(tokenizer, template):
    ask = [ChatMessage(MessageRole.USER, [{"type": "text", "text": "Is it so?"}])]
    with blocking_script(tokenizer, template, ["yes", '{"a": 1}']) as bridge:
        model = AgentrtModel(bridge, session="s1")
        message = model.generate(ask, grammar=choice(["yes", "no"]))
        assert message.content == "yes"
        assert message.raw.usage.cached_tokens["device"] == 0
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert model.generate(ask, response_format=form, max_tokens=40).content == '{"a": 1}'
        assert model.engine is bridge.engine
        with pytest.raises(RequestInvalid, match="unknown settings: colour"):
            model.generate(ask, colour="red")


class LookFlightUp(Tool):
    name = "find_flight"
    description = flight_desk.find_flight.__doc__
    inputs = {  # noqa: RUF012
        "city": {"type": "string", "description": "where to", "enum": ["Oslo", "Rome", "Paris"]}
    }
    output_type = "string"
    forward = staticmethod(flight_desk.find_flight)
    skip_forward_signature_validation = True


class LookSeatsUp(Tool):
    name = "count_seats"
    description = flight_desk.count_seats.__doc__
    inputs = {"flight_number": {"type": "string", "description": "of the flight"}}  # noqa: RUF012
    output_type = "string"
    forward = staticmethod(flight_desk.count_seats)
    skip_forward_signature_validation = True


@pytest.mark.parametrize("streams", [False, True])
def test_two_tools_and_a_final_answer_with_the_real_model(streams):
    """smolagents' own prompt, as long as it is. Which tool is next is told after each step."""
    order = [*flight_desk.TOOLS, "final_answer"]

    def name_the_next(step, agent):
        agent.model.kwargs["tool_choice"] = order[min(step.step_number, 2)]

    with blocking_engine() as bridge:
        agent = ToolCallingAgent(
            tools=[LookFlightUp(), LookSeatsUp()],
            model=AgentrtModel(
                bridge, max_tokens=60, parallel_tool_calls=False, tool_choice=order[0]
            ),
            step_callbacks=[name_the_next],
            stream_outputs=streams,
            max_steps=3,
            verbosity_level=0,
        )
        answer = agent.run(flight_desk.QUESTION)
        stats = bridge.engine.stats()
    steps = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    calls = [(call.name, call.arguments) for step in steps for call in step.tool_calls]
    assert calls == [*flight_desk.CALLS, ("final_answer", {"answer": str(flight_desk.SEATS)})]
    assert [step.observations for step in steps][:2] == flight_desk.RESULTS
    assert answer == str(flight_desk.SEATS)
    assert stats.cached_tokens > 0.6 * stats.prompt_tokens
