"""The clients of `openai` with SmolLM2: streamed calls, their results, and a typed answer."""

import json

import openai
import pytest
from flight_desk import ANSWER, CALLS, QUESTION, RESULTS, TOOLS, City, Free, Number
from pydantic import BaseModel

from agentrt import Engine

SETTINGS = {"model": "smollm2-135m", "temperature": 0, "prompt_cache_key": "desk"}
pytestmark = pytest.mark.timeout(300)


class FindFlight(BaseModel):
    """Find the number of the flight to a city."""

    city: City


class CountSeats(BaseModel):
    """Count the free seats of a flight."""

    flight_number: Number


ARGUMENTS = {"find_flight": FindFlight, "count_seats": CountSeats}


async def test_chat_completions_stream_calls_and_parse_the_answer():
    tools = [openai.pydantic_function_tool(each, name=name) for name, each in ARGUMENTS.items()]
    messages = [{"role": "user", "content": QUESTION}]
    told, settings = [], {**SETTINGS, "max_completion_tokens": 60}
    async with Engine() as engine, engine.openai() as client:
        for name, function in TOOLS.items():
            choice = {"type": "function", "function": {"name": name}}
            async with client.chat.completions.stream(
                messages=messages, tools=tools, tool_choice=choice, **settings
            ) as stream:
                deltas = [
                    event.arguments_delta
                    async for event in stream
                    if event.type == "tool_calls.function.arguments.delta"
                ]
                message = (await stream.get_final_completion()).choices[0].message
            (call,) = message.tool_calls
            assert len(deltas) > 1
            assert "".join(deltas) == call.function.arguments
            assert isinstance(call.function.parsed_arguments, ARGUMENTS[name])
            arguments = json.loads(call.function.arguments)
            told.append((name, arguments))
            messages.append({"role": "assistant", "tool_calls": [call.model_dump(
                include={"id": True, "type": True, "function": {"name", "arguments"}}
            )]})  # fmt: skip
            result = function(**arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        done = await client.chat.completions.parse(
            messages=messages, tools=tools, tool_choice="none", response_format=Free, **settings
        )
    assert told == CALLS
    assert [each["content"] for each in messages if each["role"] == "tool"] == RESULTS
    assert done.choices[0].message.parsed == ANSWER
    usage = done.usage
    assert usage.prompt_tokens_details.cached_tokens > 0.9 * usage.prompt_tokens


async def test_responses_go_on_from_each_other_to_a_typed_answer():
    tools = [
        {"type": "function", "name": name, "description": each.__doc__, "strict": True,
         "parameters": {**each.model_json_schema(), "additionalProperties": False}}
        for name, each in ARGUMENTS.items()
    ]  # fmt: skip
    said, previous, told = QUESTION, None, []
    settings = {**SETTINGS, "max_output_tokens": 60, "tools": tools}
    async with Engine() as engine, engine.openai() as client:
        for name, function in TOOLS.items():
            made = await client.responses.create(
                input=said,
                previous_response_id=previous,
                tool_choice={"type": "function", "name": name},
                **settings,
            )
            (call,) = made.output
            arguments = json.loads(call.arguments)
            told.append((call.name, arguments))
            output = function(**arguments)
            said = [{"type": "function_call_output", "call_id": call.call_id, "output": output}]
            previous = made.id
        done = await client.responses.parse(
            input=said,
            previous_response_id=previous,
            tool_choice="none",
            text_format=Free,
            **settings,
        )
    assert told == CALLS
    assert done.output_parsed == ANSWER
    usage = done.usage
    assert usage.input_tokens_details.cached_tokens > 0.9 * usage.input_tokens
