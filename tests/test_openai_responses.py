"""The Responses API in process: items, events in the documented order, and what is stored."""

import json

import openai
import pytest
from openai_wire import MODEL, RESPONSE_TOOLS
from pydantic import BaseModel
from scripted import call_text, scripted

from agentrt.template import ChatTemplate


class Answer(BaseModel):
    certain: bool


async def respond(client, content="Hi", **fields):
    fields = {"model": MODEL, "input": content, "temperature": 0, **fields}
    return await client.responses.create(**fields)


async def events_of(client, content="Hi", **fields):
    stream = await respond(client, content, stream=True, **fields)
    return [event async for event in stream]


def kinds(events):
    """The types in order, deltas in a row as one."""
    found = [event.type.removeprefix("response.") for event in events]
    return [k for i, k in enumerate(found) if not (k.endswith("delta") and found[i - 1] == k)]


async def test_a_response_and_what_it_cost(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello!"]) as engine:
        made = await respond(engine.openai(), instructions="Be kind.", metadata={"run": "7"})
        assert (made.output_text, made.status, made.error) == ("Hello!", "completed", None)
        (message,) = made.output
        assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
        assert (made.instructions, made.metadata, made.tools) == ("Be kind.", {"run": "7"}, [])
        assert (made.model, made.tool_choice, made.temperature) == (MODEL, "auto", 0)
        usage = made.usage
        assert usage.output_tokens == len("Hello!") + 1
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.input_tokens_details.cached_tokens == 0


async def test_events_of_text_come_in_the_documented_order(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello, you!"]) as engine:
        events = await events_of(engine.openai())
        assert kinds(events) == [
            "created", "in_progress", "output_item.added", "content_part.added",
            "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
            "completed",
        ]  # fmt: skip
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].response.status == "in_progress"
        assert events[0].response.output == []
        text = "".join(event.delta for event in events if event.type.endswith("delta"))
        assert text == events[-1].response.output_text == "Hello, you!"
        assert next(e for e in events if e.type.endswith("text.done")).text == text
        ids = {event.item_id for event in events if hasattr(event, "item_id")}
        assert ids == {events[-1].response.output[0].id}


async def test_events_of_calls_follow_those_of_the_text(tokenizer, template):
    calls = [call_text("add", '{"a": 1, "b": 2}'), call_text("subtract", '{"a": 3, "b": 4}')]
    async with scripted(tokenizer, template, ["Wait. " + "\n".join(calls)]) as engine:
        events = await events_of(engine.openai(), tools=RESPONSE_TOOLS)
        call = [
            "output_item.added", "function_call_arguments.delta",
            "function_call_arguments.done", "output_item.done",
        ]  # fmt: skip
        assert kinds(events) == [
            "created", "in_progress", "output_item.added", "content_part.added",
            "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
            *call, *call, "completed",
        ]  # fmt: skip
        text, *made = events[-1].response.output
        assert text.content[0].text == "Wait. "
        assert [(c.name, json.loads(c.arguments)) for c in made] == [
            ("add", {"a": 1, "b": 2}), ("subtract", {"a": 3, "b": 4}),
        ]  # fmt: skip
        assert len({c.call_id for c in made}) == 2
        assert len({item.id for item in (text, *made)}) == 3
        for index, item in enumerate(made, start=1):
            deltas = [e.delta for e in events if e.type.endswith("arguments.delta")
                      and e.output_index == index]  # fmt: skip
            assert "".join(deltas) == item.arguments


async def test_thoughts_are_an_item_of_their_own(tokenizer):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    texts = ["<think>\nHm, two.\n</think>\n\nTwo.", "Yes."]
    async with scripted(tokenizer, ChatTemplate(source), texts) as engine:
        client = engine.openai()
        events = await events_of(client)
        assert kinds(events)[2:8] == [
            "output_item.added", "content_part.added", "reasoning_text.delta",
            "reasoning_text.done", "content_part.done", "output_item.done",
        ]  # fmt: skip
        thought, message = events[-1].response.output
        assert (thought.type, thought.content[0].text.strip()) == ("reasoning", "Hm, two.")
        assert message.content[0].text == "Two."
        # and may be given back with the rest of the output
        items = [item.model_dump(exclude_none=True) for item in (thought, message)]
        again = await respond(client, [*items, {"role": "user", "content": "Sure?"}], store=False)
        assert again.output_text == "Yes."


async def test_a_response_goes_on_from_the_one_before(tokenizer, template):
    texts = ["Wait. " + call_text("add", '{"a": 2, "b": 3}'), "It is 5.", "You are welcome.", "Hm."]
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        first = await respond(client, tools=RESPONSE_TOOLS)
        call = first.output[1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        second = await respond(
            client, [result], tools=RESPONSE_TOOLS, previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        third = await respond(
            client, "Thanks", tools=RESPONSE_TOOLS, previous_response_id=second.id
        )
        assert third.output_text == "You are welcome."
        # as in a session, each finds all of what was read and written before, but its last token
        for before, after in ((first, second), (second, third)):
            cached = after.usage.input_tokens_details.cached_tokens
            assert cached == before.usage.total_tokens - 1
        # one may go on from any of them, and the caller may as well say all of it again
        items = [
            {"role": "user", "content": "Hi"}, *first.output, result,
            *second.output, {"role": "user", "content": "Thanks"},
        ]  # fmt: skip
        same = await respond(client, items, tools=RESPONSE_TOOLS)
        assert same.usage.input_tokens == third.usage.input_tokens


async def test_instructions_are_those_of_their_response_alone(tokenizer, template):
    async with scripted(tokenizer, template, ["a", "b", "b"]) as engine:
        client = engine.openai()
        first = await respond(client, instructions="x" * 50)
        bare = await respond(client, previous_response_id=first.id)
        told = await respond(client, previous_response_id=first.id, instructions="x" * 50)
        system = 50 + len("system\n\n") + len(["<|im_start|>", "<|im_end|>"])
        assert told.usage.input_tokens - bare.usage.input_tokens == system


async def test_what_is_stored_can_be_read_and_deleted(tokenizer, template):
    async with scripted(tokenizer, template, ["a", "b"]) as engine:
        client = engine.openai()
        stored = await respond(client)
        assert await client.responses.retrieve(stored.id) == stored
        passing = await respond(client, store=False)
        with pytest.raises(openai.NotFoundError, match="store=false"):
            await client.responses.retrieve(passing.id)
        await client.responses.delete(stored.id)
        with pytest.raises(openai.BadRequestError) as refused:
            await respond(client, previous_response_id=stored.id)
        assert refused.value.param == "previous_response_id"


async def test_what_a_response_was_made_from_is_listed(tokenizer, template):
    texts = ["Wait. " + call_text("add", '{"a": 2, "b": 3}'), "It is 5.", "Bye."]
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        first = await respond(
            client, [{"role": "developer", "content": "Add."}, {"role": "user", "content": "2+3?"}],
            tools=RESPONSE_TOOLS, instructions="Be short.",
        )  # fmt: skip
        call = first.output[1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        second = await respond(
            client, [result], tools=RESPONSE_TOOLS, previous_response_id=first.id
        )
        listed = client.responses.input_items
        items = (await listed.list(second.id, order="asc")).data
        assert [item.type for item in items] == [
            "message", "message", "message", "function_call", "function_call_output",
        ]  # fmt: skip
        assert [item.role for item in items[:3]] == ["developer", "user", "assistant"]
        assert [item.content[0].text for item in items[:3]] == ["Add.", "2+3?", "Wait. "]
        assert [item.id for item in items[2:4]] == [item.id for item in first.output]
        assert (items[4].call_id, items[4].output) == (call.call_id, "5")
        # newest first unless it is asked otherwise; pages follow one another
        newest = await listed.list(second.id, limit=2)
        assert newest.has_more
        walked = [item.id async for item in listed.list(second.id, limit=2)]
        assert walked == [item.id for item in reversed(items)]
        # items that are given whole come back as they went in
        again = [item.model_dump(exclude_none=True) for item in items]
        third = await respond(client, again, tools=RESPONSE_TOOLS)
        assert (await listed.list(third.id, order="asc")).data == items


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "msg_0"}, "after"),
        ({"include": ["message.output_text.logprobs"]}, "include[]"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_query_is_checked_as_a_body_is(tokenizer, template, query, param):
    async with scripted(tokenizer, template, ["a"]) as engine:
        client = engine.openai()
        made = await respond(client)
        path = f"/responses/{made.id}/input_items"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.get(path, cast_to=object, options={"params": query})
        assert refused.value.param == param
        with pytest.raises(openai.BadRequestError, match="unknown parameter 'stream'"):
            await client.responses.retrieve(made.id, stream=True)
        with pytest.raises(openai.NotFoundError, match="is not stored"):
            await client.responses.input_items.list("resp_0")


async def test_an_answer_that_is_cut_off_is_incomplete(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello!"] * 2) as engine:
        client = engine.openai()
        events = await events_of(client, max_output_tokens=3)
        response = events[-1].response
        assert (events[-1].type, response.status) == ("response.incomplete", "incomplete")
        assert response.incomplete_details.reason == "max_output_tokens"
        assert (response.output_text, response.output[0].status) == ("Hel", "incomplete")


async def test_a_failure_on_the_way_is_an_event(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 100]) as engine:
        stream = await respond(engine.openai(), stream=True)
        await anext(stream)
        engine.runner.fail_at_step = engine.runner.num_steps + 1
        events = [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert "the fake device broke" in events[-1].response.error.message


async def test_parse_and_logprobs(tokenizer, template):
    async with scripted(tokenizer, template, ['{"certain": true}', "Hi"]) as engine:
        client = engine.openai()
        parsed = await client.responses.parse(
            model=MODEL, input="Well?", text_format=Answer, temperature=0
        )
        assert parsed.output_parsed == Answer(certain=True)
        told = await respond(client, include=["message.output_text.logprobs"], top_logprobs=1)
        logprobs = told.output[0].content[0].logprobs
        assert [each.token for each in logprobs] == ["H", "i"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]},
         "input[0].call_id"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"n": 2}, "n"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_refused_by_its_name(tokenizer, template, fields, param):
    async with scripted(tokenizer, template, []) as engine:
        fields = {"input": "Hi", **fields}
        with pytest.raises(openai.BadRequestError) as refused:
            await engine.openai().post(
                "/responses", body={"model": MODEL, **fields}, cast_to=object
            )
        assert refused.value.param == param
