"""Chat Completions in process: the client of `openai` against an engine, without a port."""

import asyncio
import json
import re
import runpy
from pathlib import Path
from typing import Literal

import httpx
import openai
import pytest
import tokenizers
from fakes import FakeEngine, until
from openai_wire import CHAT_TOOLS, MODEL, user
from pydantic import BaseModel
from scripted import call_text, scripted
from tokenizers import decoders, models, pre_tokenizers

from agentrt.adapters.openai import Api, transport
from agentrt.config import default_cache_dir
from agentrt.errors import RequestInvalid
from agentrt.grammar import MAX_STRING_CHARACTERS
from agentrt.guards import Pass, Redact, Span, Stop
from agentrt.template import ChatTemplate
from agentrt.tokenizer import load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "openai_client.py"


async def ask(client, content="Hi", **fields):
    fields = {"model": MODEL, "messages": [user(content)], "temperature": 0, **fields}
    return await client.chat.completions.create(**fields)


async def chunks_of(client, content="Hi", **fields):
    stream = await ask(client, content, stream=True, **fields)
    return [chunk async for chunk in stream]


# ---- text


async def test_an_answer_and_what_it_cost(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello!", "Hello!"]) as engine:
        client = engine.openai()
        first = await ask(client, metadata={"run": "7"})
        choice = first.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello!")
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
        assert choice.message.tool_calls is None
        assert (first.model, first.object, first.metadata) == (
            MODEL, "chat.completion", {"run": "7"},
        )  # fmt: skip
        prompt = tokenizer.encode(
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", allow_special=True
        )
        usage = first.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len("Hello!") + 1)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens_details.cached_tokens == 0
        # the same prompt again: all of it is cached but its last token, which is computed always
        again = (await ask(client)).usage.prompt_tokens_details.cached_tokens
        assert again == len(prompt) - 1
        assert engine.stats().cached_tokens == again


async def test_chunks_add_up_to_the_answer(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello, you!"]) as engine:
        chunks = await chunks_of(engine.openai(), stream_options={"include_usage": True})
        *parts, last = chunks
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello, you!"
        reasons = [part.choices[0].finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["stop"]
        assert last.choices == []
        assert (last.usage.completion_tokens, last.usage.prompt_tokens_details.cached_tokens) == (
            len("Hello, you!") + 1, 0,
        )  # fmt: skip
        assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
            (last.id, MODEL, "chat.completion.chunk")
        }
        assert all(part.usage is None for part in parts)


async def test_an_event_is_one_line_whatever_text_it_holds(tokenizer, template):
    text = "a\x85b\u2028c\u2029d\ne\rf\x0bg"
    async with scripted(tokenizer, template, [text, text]) as engine:
        fields = {"model": MODEL, "messages": [user("Hi")], "temperature": 0, "stream": True}
        answer = await Api(engine).answer(
            "POST", "/v1/chat/completions", json.dumps(fields).encode()
        )
        body = b"".join([part async for part in answer.body]).decode()
        assert all(not line or line.startswith("data: ") for line in body.splitlines())
        chunks = await chunks_of(engine.openai())
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


async def test_each_token_has_its_logprobs(tokenizer, template):
    async with scripted(tokenizer, template, ["Héy", "Héy"]) as engine:
        whole = await ask(engine.openai(), logprobs=True, top_logprobs=2)
        content = whole.choices[0].logprobs.content
        assert b"".join(map(bytes, (each.bytes for each in content))).decode() == "Héy"
        assert content[0].token == "H"
        for each in content:
            assert each.top_logprobs[0].token == each.token
            assert len(each.top_logprobs) == 2
            assert each.logprob == each.top_logprobs[0].logprob <= 0
        chunks = await chunks_of(engine.openai(), logprobs=True, top_logprobs=2)
        streamed = [
            entry
            for chunk in chunks
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert streamed == content


async def test_samples_come_side_by_side_and_repeat_with_their_seed(tokenizer, template):
    async with scripted(tokenizer, template, []) as engine:
        engine.runner.script = lambda *_: None  # noise
        client = engine.openai()
        options = {"n": 3, "temperature": 1.5, "seed": -7, "max_completion_tokens": 12}
        whole = await ask(client, **options)
        texts = [choice.message.content for choice in whole.choices]
        assert len(set(texts)) == 3
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert whole.usage.completion_tokens <= 36
        told = dict.fromkeys(range(3), "")
        for chunk in await chunks_of(client, **options):
            told[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert list(told.values()) == texts


async def test_options_reach_the_sampler(tokenizer, template):
    async with scripted(tokenizer, template, ["one two", "aaaa", "abc"]) as engine:
        client = engine.openai()
        stopped = await ask(client, stop=["tw"])
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (
            "one ", "stop",
        )  # fmt: skip
        cut = await ask(client, max_completion_tokens=2)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("aa", "length")
        # the script's token has a score of 10, any other 0
        b, x = tokenizer.encode("b")[0], tokenizer.encode("x")[0]
        biased = await ask(client, logit_bias={str(b): -100, str(x): 5})
        assert biased.choices[0].message.content == "axc"
        engine.runner.script = lambda *_: tokenizer.encode("a")[0]
        same = await ask(client, max_tokens=8)
        assert same.choices[0].message.content == "a" * 8
        varied = await ask(client, max_tokens=8, frequency_penalty=2, presence_penalty=2)
        assert varied.choices[0].message.content[:4] == "aaaa"  # 10 - 2 * 4 - 2 = 0
        assert varied.choices[0].message.content != "a" * 8


async def test_roles_and_parts_become_the_templates_messages(tokenizer, template):
    async with scripted(tokenizer, template, ["ok"]) as engine:
        parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
        messages = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
            user("four <|im_end|>"),  # the text of a special token stays text
        ]
        usage = (await ask(engine.openai(), messages=messages)).usage
        shown = [("system", "Be kind."), ("user", "one, two"), ("assistant", "three")]
        ids = [
            token
            for role, text in shown
            for token in tokenizer.encode(
                f"<|im_start|>{role}\n{text}<|im_end|>\n", allow_special=True
            )
        ]
        ids += tokenizer.encode("<|im_start|>user\n", allow_special=True)
        ids += tokenizer.encode("four <|im_end|>")
        ids += tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", allow_special=True)
        assert usage.prompt_tokens == len(ids)


# ---- tools


async def test_calls_stream_as_they_are_written(tokenizer, template):
    texts = ["Wait. " + call_text("add", '{"a": 12, "b": 3}')] * 2
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        whole = (await ask(client, tools=CHAT_TOOLS)).choices[0]
        assert (whole.message.content, whole.finish_reason) == ("Wait. ", "tool_calls")
        (call,) = whole.message.tool_calls
        assert (call.type, call.function.name) == ("function", "add")
        assert call.function.arguments == '{"a": 12, "b": 3}'
        engine.gate.close()  # one step at a time: no deltas are merged
        engine.gate.allow(10_000)
        chunks = await chunks_of(client, tools=CHAT_TOOLS)
        deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
        assert [each.index for each in deltas] == [0] * len(deltas)
        assert deltas[0].function.name == "add"
        assert deltas[0].id != call.id
        assert "".join(each.function.arguments for each in deltas) == '{"a": 12, "b": 3}'


async def test_a_tool_loop_finds_what_the_model_wrote_in_the_cache(tokenizer, template):
    """The second request begins with the very tokens of the first and of its answer."""
    texts = [call_text("add", '{"a": 2, "b": 3}'), "It is 5."]
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        first = await ask(client, tools=CHAT_TOOLS, prompt_cache_key="session 1")
        message = first.choices[0].message
        (call,) = message.tool_calls
        assert await pauses(engine) == 1  # the KV may make room while the caller's tool runs
        messages = [
            user("Hi"),
            message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "5"},
        ]
        second = await ask(
            client, messages=messages, tools=CHAT_TOOLS, prompt_cache_key="session 1"
        )
        assert second.choices[0].message.content == "It is 5."
        before = first.usage.prompt_tokens + first.usage.completion_tokens
        assert second.usage.prompt_tokens_details.cached_tokens == before - 1
        assert await pauses(engine) == 0


async def pauses(engine):
    loop = engine._open.loop
    return await asyncio.wrap_future(loop.call(lambda: len(loop.scheduler.pauses._pauses)))


@pytest.fixture
def merging(tmp_path):
    """A tokenizer that writes "ab" as one token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    ids = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(ids, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return load_tokenizer(tmp_path)


async def test_what_the_model_wrote_is_never_encoded_anew(merging, template):
    """A text can be written in more than one way; the next turn keeps the way of the model."""
    assert len(merging.encode("ab")) == 1
    spelled = [*merging.encode("a"), *merging.encode("b"), *merging.eos_token_ids]
    async with scripted(merging, template, []) as engine:
        engine.runner.script = lambda _, n: spelled[min(n, 2)]
        client = engine.openai()
        first = await ask(client)
        assert first.choices[0].message.content == "ab"
        messages = [user("Hi"), first.choices[0].message, user("Go on")]
        second = await ask(client, messages=messages)
        before = first.usage.prompt_tokens + first.usage.completion_tokens
        assert second.usage.prompt_tokens_details.cached_tokens == before - 1


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"tool_choice": "required"}, '<tool_call>\n{"name": "'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "subtract"}}},
            '<tool_call>\n{"name": "subtract", "arguments": {"a": ',
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "add"}}],
                    },
                }
            },
            '<tool_call>\n{"name": "add", "arguments": {"a": ',
        ),
    ],
)
async def test_a_choice_of_tools_holds_the_model(tokenizer, template, fields, begins):
    """It would write noise; the grammar lets it only call, and the tool that was named."""
    async with scripted(tokenizer, template, []) as engine:
        engine.runner.script = lambda *_: None
        seen = []
        told = engine.runner.before_step
        engine.runner.before_step = lambda: (told(), seen.extend(running(engine)))
        answer = await ask(engine.openai(), tools=CHAT_TOOLS, max_tokens=60, **fields)
        assert tokenizer.decode(seen[-1]).startswith(begins)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name in begins + "add subtract"


def running(engine):
    return [request.output.tolist() for request in engine._open.loop.scheduler.running]


async def test_no_tool_is_called_where_none_may_be(tokenizer, template):
    texts = ["Plain text.", "Plain text."]
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        free = await ask(client, tools=CHAT_TOOLS)
        none = await ask(client, tools=CHAT_TOOLS, tool_choice="none")
        assert none.choices[0].message.content == "Plain text."
        # the model is told of its tools all the same: the prompt stays the same, and cached
        assert none.usage.prompt_tokens == free.usage.prompt_tokens
        assert none.usage.prompt_tokens_details.cached_tokens == free.usage.prompt_tokens - 1
        engine.runner.script = lambda *_: tokenizer.encode("<")[0]
        forced = await ask(client, tools=CHAT_TOOLS, tool_choice="none", max_tokens=4)
        assert not forced.choices[0].message.content.startswith("<")


async def test_parallel_calls(tokenizer, template):
    calls = [call_text("add", '{"a": 1, "b": 1}'), call_text("subtract", '{"a": 2, "b": 2}')]
    async with scripted(tokenizer, template, ["\n".join(calls)] * 2) as engine:
        client = engine.openai()
        both = (await ask(client, tools=CHAT_TOOLS)).choices[0].message.tool_calls
        assert [call.function.name for call in both] == ["add", "subtract"]
        assert both[0].id != both[1].id
        one = await ask(client, tools=CHAT_TOOLS, parallel_tool_calls=False)
        assert [call.function.name for call in one.choices[0].message.tool_calls] == ["add"]


async def test_a_call_that_is_cut_off_stays_a_call(tokenizer, template):
    async with scripted(tokenizer, template, [call_text("add", '{"a": 12, "b": 3}')]) as engine:
        size = len('<tool_call>\n{"name": "add", "arguments": {"a": 12, ')
        answer = (await ask(engine.openai(), tools=CHAT_TOOLS, max_tokens=size)).choices[0]
        assert answer.finish_reason == "length"
        assert answer.message.content is None
        assert answer.message.tool_calls[0].function.arguments.rstrip() == '{"a": 12,'


async def test_references_of_a_tools_schema_are_written_out(tokenizer, template):
    schema = {
        "type": "object",
        "properties": {"where": {"$ref": "#/$defs/Place"}},
        "required": ["where"],
        "$defs": {"Place": {"type": "string", "enum": ["here"]}},
    }
    tools = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
    async with scripted(tokenizer, template, []) as engine:
        engine.runner.script = lambda *_: None
        answer = await ask(engine.openai(), tools=tools, tool_choice="required", n=1)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.arguments == '{"where": "here"}'


# ---- formats


class Verdict(BaseModel):
    """An answer that cannot go on for ever, whatever the model would write."""

    word: Literal["yes", "no"]
    certain: bool


async def test_parse_gives_the_model_of_pydantic(tokenizer, template):
    async with scripted(tokenizer, template, []) as engine:
        engine.runner.script = lambda *_: None  # noise: the grammar alone shapes it
        client = engine.openai()
        answer = await client.chat.completions.parse(
            model=MODEL, messages=[user("Well?")], response_format=Verdict, temperature=0
        )
        verdict = answer.choices[0].message.parsed
        assert isinstance(verdict, Verdict)
        assert json.loads(answer.choices[0].message.content) == verdict.model_dump()


async def test_json_object_is_any_object(tokenizer, template):
    async with scripted(tokenizer, template, ["{}"]) as engine:
        answer = await ask(engine.openai(), response_format={"type": "json_object"})
        assert json.loads(answer.choices[0].message.content) == {}


async def test_a_format_holds_the_answer_and_calls_stay_possible(tokenizer, template):
    texts = [call_text("add", '{"a": 1, "b": 2}'), '{"word": "no", "certain": true}']
    form = {
        "type": "json_schema",
        "json_schema": {"name": "v", "strict": True, "schema": Verdict.model_json_schema()},
    }
    async with scripted(tokenizer, template, texts) as engine:
        client = engine.openai()
        call = (await ask(client, tools=CHAT_TOOLS, response_format=form)).choices[0]
        assert call.finish_reason == "tool_calls"
        answer = (await ask(client, tools=CHAT_TOOLS, response_format=form)).choices[0]
        assert Verdict.model_validate_json(answer.message.content).word == "no"


async def test_bounds_are_the_callers_own(tokenizer, template):
    """A text of a schema may be longer than what our own types are held to."""
    text = "x" * (MAX_STRING_CHARACTERS + 10)
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "string"}}}
    async with scripted(tokenizer, template, [json.dumps(text)]) as engine:
        answer = await ask(engine.openai(), response_format=form)
        assert json.loads(answer.choices[0].message.content) == text


# ---- closing and failing


async def test_closing_the_stream_frees_the_request_within_a_step(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 100]) as engine:
        stream = await ask(engine.openai(), stream=True)
        await anext(stream)
        engine.gate.close()
        await engine.until_held()  # a step was begun, and the request is part of it
        await stream.close()
        steps = engine.runner.num_steps
        engine.gate.open()
        await until(lambda: engine.stats().running == 0)
        assert engine.runner.num_steps <= steps + 1
        assert engine.stats().cancelled == 1
        assert await engine.leased_blocks() == 0


async def test_any_task_may_close_a_stream_that_another_reads(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 100]) as engine:
        stream = await ask(engine.openai(), stream=True)
        engine.gate.close()
        reading = asyncio.create_task(all_of(stream))
        await engine.until_held()
        await stream.close()
        await reading
        engine.gate.open()
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().cancelled == 1


async def all_of(stream):
    return [chunk async for chunk in stream]


async def test_cancelling_the_call_frees_its_requests(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 100]) as engine:
        engine.gate.close()
        asking = asyncio.create_task(ask(engine.openai(), n=2))
        await until(lambda: engine._open.loop.num_queued == 2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        engine.gate.open()
        await until(lambda: engine.stats().cancelled == 2)
        assert await engine.leased_blocks() == 0


async def test_the_clients_timeout_holds(tokenizer, template):
    async with scripted(tokenizer, template, ["word " * 100]) as engine:
        engine.gate.close()
        client = engine.openai(timeout=0.05, max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            await ask(client)
        engine.gate.open()
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().cancelled == 1


async def test_a_stream_that_fails_on_the_way_says_so(tokenizer, template):
    engine = scripted(tokenizer, template, ["word " * 100])
    async with engine:
        stream = await ask(engine.openai(), stream=True)
        await anext(stream)
        engine.runner.fail_at_step = engine.runner.num_steps + 1
        with pytest.raises(openai.APIError, match="the fake device broke"):
            await all_of(stream)
        with pytest.raises(openai.InternalServerError, match="step thread failed"):
            await ask(engine.openai(max_retries=5))  # told not to try again: no wait


async def test_a_closed_engine_refuses(tokenizer, template):
    async with scripted(tokenizer, template, []) as engine:
        client = engine.openai()
    with pytest.raises(openai.InternalServerError) as refused:
        await ask(client)
    assert (refused.value.status_code, refused.value.code) == (503, "engine_closed")


async def test_an_engine_that_is_full_may_be_asked_again(tokenizer, template):
    async with scripted(tokenizer, template, ["a", "b"], max_waiting=1, max_batch=1) as engine:
        engine.gate.close()
        client = engine.openai(max_retries=0)
        running = [asyncio.create_task(ask(client)) for _ in range(2)]
        await until(lambda: engine._open.loop.num_queued == 2)
        with pytest.raises(openai.RateLimitError, match="max_waiting"):
            await ask(client)
        engine.gate.open()
        await asyncio.gather(*running)


# ---- guards


async def hide_numbers(view):
    spans = [
        Span(view.start + i, view.start + i + 1, "#")
        for i, character in enumerate(view.window)
        if character.isdigit()
    ]
    return Redact(spans) if spans else Pass()


async def stop_bombs(view):
    return Stop("no bombs") if "bomb" in view.text else Pass()


async def test_guards_of_the_engine_watch_the_wire(tokenizer, template):
    texts = ["It is 42.", "a bomb", "fine"]
    engine = scripted(tokenizer, template, texts)
    engine.output_guards, engine.input_guards = (hide_numbers, stop_bombs), (stop_bombs,)
    async with engine:
        client = engine.openai()
        assert (await ask(client)).choices[0].message.content == "It is ##."
        stopped = (await ask(client)).choices[0]
        assert stopped.finish_reason == "content_filter"
        assert "bomb" not in stopped.message.content
        with pytest.raises(openai.BadRequestError, match="no bombs") as refused:
            await ask(client, "how to build a bomb")
        assert refused.value.code == "content_filter"
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            await ask(client, logprobs=True)


# ---- models and clients


async def test_models(tokenizer, template):
    async with scripted(tokenizer, template, []) as engine:
        client = engine.openai()
        (model,) = (await client.models.list()).data
        assert (model.id, model.owned_by) == (MODEL, "agentrt")
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' does not exist"):
            await client.models.retrieve("gpt-4o")
        with pytest.raises(openai.NotFoundError, match="this engine runs 'fake'"):
            await ask(client, model="gpt-4o")


async def test_the_older_httpx_is_served_by_the_same_code(tokenizer, template):
    async with scripted(tokenizer, template, ["Hello!", "Hello!"]) as engine:
        http = httpx.AsyncClient(transport=transport(httpx, Api(engine)))
        client = engine.openai(http_client=http)
        assert (await ask(client)).choices[0].message.content == "Hello!"
        texts = [chunk.choices[0].delta.content or "" for chunk in await chunks_of(client)]
        assert "".join(texts) == "Hello!"
        await client.close()


async def test_a_model_without_a_template_says_so():
    async with FakeEngine() as engine:
        with pytest.raises(RequestInvalid, match="no tokenizer"):
            engine.openai()


async def test_thoughts_are_no_content(tokenizer):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    texts = ["<think>\nHm, two.\n</think>\n\nTwo."]
    async with scripted(tokenizer, ChatTemplate(source), texts) as engine:
        answer = await ask(engine.openai())
        message = answer.choices[0].message
        assert message.content == "Two."
        assert message.reasoning_content.strip() == "Hm, two."
        details = answer.usage.completion_tokens_details
        assert details.reasoning_tokens == len(message.reasoning_content)
        assert answer.usage.completion_tokens == len(texts[0]) + 1


# ---- the real model


@pytest.mark.timeout(300)
def test_a_task_with_a_tool_over_several_turns(tmp_path, monkeypatch, capsys):
    """The example: two questions, each a call, its result, and an answer from it."""
    for name in ("models", "kernels"):
        folder = default_cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    monkeypatch.setenv("AGENTRT_CACHE_DIR", str(tmp_path))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" -> ")[0] for line in lines[::3]] == [
        "[call] get_reservation(ZX12AB)", "[call] get_reservation(4BMN53)",
    ]  # fmt: skip
    assert "May 20" in lines[1]
    assert "June 3" in lines[4]
    for line in lines[2::3]:
        cached, prompt = map(int, re.findall(r"\d+", line))
        assert 0.8 * prompt < cached < prompt
