"""The wire of OpenAI's API: what is refused, and a fuzz.

`AGENTRT_FUZZ_REQUESTS=5000` makes the fuzz as long as it says; by default it is short.
"""

import asyncio
import contextlib
import json
import os
import warnings

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from openai_wire import ADD, CHAT_TOOLS, MODEL, RESPONSE_TOOLS, user
from scripted import scripted

from agentrt.adapters.openai import Api, transport
from agentrt.adapters.openai.chat_request import FIELDS as CHAT_FIELDS
from agentrt.adapters.openai.chat_request import read_chat_request
from agentrt.adapters.openai.fields import read_json
from agentrt.adapters.openai.refusal import Refusal
from agentrt.adapters.openai.responses_request import FIELDS as RESPONSE_FIELDS

NUM_REQUESTS = int(os.environ.get("AGENTRT_FUZZ_REQUESTS", "400"))
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
PLAIN = {"model": MODEL, "messages": [user("Hi")]}


# ---- every field of OpenAI's own list is known here


def test_no_field_of_openais_list_is_unknown():
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as Chat
    from openai.types.responses.response_create_params import (
        ResponseCreateParamsStreaming as Responses,
    )

    assert set(Chat.__annotations__) <= set(CHAT_FIELDS)
    # what is newer than this list is refused as unknown, by its name
    newer = {"access_programs", "background_options", "image"}
    assert set(Responses.__annotations__) - newer <= set(RESPONSE_FIELDS)


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"model": None}, "model", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "poet", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x",
         "unknown_parameter"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": ""}}])]},
         "messages[0].content[0].type", "unsupported_parameter"),
        ({"messages": [{"role": "tool", "content": "", "tool_call_id": "x"}]},
         "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[1"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 10**400}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", None),
        ({"n": 129}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"functions": [ADD]}, "functions", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice", "invalid_value"),
        ({"tools": CHAT_TOOLS * 2}, None, None),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
         "tools[0].function.name", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}}}}]},
         "tools[0].function.parameters", "invalid_json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "string", "pattern": "("}}}}, None, None),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "invalid_value"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"messages": [user("x" * 7000)]}, None, "context_length_exceeded"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(tokenizer, template, fields, param, code):
    async with scripted(tokenizer, template, []) as engine:
        body = json.dumps({**PLAIN, **fields}).encode()
        answer = await Api(engine).answer("POST", CHAT, body)
        error = json.loads(answer.body)["error"]
        assert answer.status == 400, error
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["code"]) == (param, code), error
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) > 10


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v1/embeddings", 404, "no embeddings"),
        ("POST", "/v1/completions", 404, "chat/completions"),
        ("GET", "/v1/files", 404, "/v1/responses"),
        ("GET", "/", 404, "/v1/"),
        ("GET", CHAT, 405, "POST"),
        ("DELETE", "/v1/models/fake", 405, "GET"),
        ("GET", "/v1/responses/resp_0", 404, "not stored"),
        ("GET", "/v1/responses/resp_0/input_items", 404, "not stored"),
        ("POST", "/v1/responses/resp_0/input_items", 405, "GET"),
        ("POST", "/v1/responses/resp_0/cancel", 404, "/v1/responses/ID"),
    ],
)
async def test_other_paths_are_refused(tokenizer, template, method, path, status, words):
    async with scripted(tokenizer, template, []) as engine:
        answer = await Api(engine).answer(method, path, b"")
        assert answer.status == status
        assert words in json.loads(answer.body)["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000, b'"\\ud800"',
        b'{"model": "x\\udfff"}', b"null", b"[]",
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(Refusal):
        read_chat_request(read_json(body))


def test_null_is_absent():
    fields = set(CHAT_FIELDS) - {"model", "messages"}
    assert read_chat_request({**PLAIN, **dict.fromkeys(fields)}) == read_chat_request(PLAIN)


# ---- fuzz

PLAIN_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 2**63, 1e308, -0.0, "", "auto", "required", "user"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
ANYTHING = st.recursive(
    PLAIN_VALUES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "name", "function", "text", "x"])
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYWORDS = [
    *("type", "properties", "items", "required", "enum", "const", "anyOf", "allOf", "$ref"),
    *("$defs", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "minItems"),
    *("maxItems", "additionalProperties", "patternProperties", "default", "examples", "title"),
    *("x-guidance", "not", "oneOf", "prefixItems", "description", "minProperties"),
]
SCHEMAS = st.recursive(
    st.sampled_from([{"type": "string", "maxLength": 3}, {"type": "boolean"}, {}, {"enum": [1]}])
    | ANYTHING,
    lambda inner: st.dictionaries(
        st.sampled_from(KEYWORDS),
        inner
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.sampled_from(["object", "array", "string", ["integer", "null"], "#/$defs/a"]),
        max_size=4,
    ),
    max_leaves=8,
)
ROLES = st.sampled_from([*["user", "assistant", "system"] * 6, "developer", "tool", "poet"])
CONTENTS = (
    st.text(max_size=30)
    | st.text(max_size=30)
    | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)}))
)
CALLS = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["c1", "c2"]),
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["add", "subtract", ""]),
                "arguments": st.sampled_from(['{"a": 1, "b": 2}', "{}", "[", "", "1e999"]),
            }
        ),
    }
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": CONTENTS},
        optional={
            "tool_calls": st.lists(CALLS, max_size=2) | ANYTHING,
            "tool_call_id": st.sampled_from(["c1", "c2", "c3"]),
            "name": st.text(max_size=5),
            "refusal": st.none() | st.text(max_size=5),
        },
    ),
    max_size=4,
)
CHOICES = st.sampled_from(
    ["none", "auto", "required", {"type": "function", "function": {"name": "add"}},
     {"type": "function", "name": "add"}, {"type": "custom"}]
)  # fmt: skip
RIGHT = {
    "messages": MESSAGES,
    "input": st.text(max_size=20) | MESSAGES,
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "max_output_tokens": st.integers(1, 6),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=2) | st.lists(st.text(min_size=1, max_size=2), max_size=4),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.integers(-100, 100), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "stream": st.booleans(),
    "tool_choice": CHOICES,
    "parallel_tool_calls": st.booleans(),
    "metadata": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    "user": st.text(max_size=5),
    "prompt_cache_key": st.text(max_size=5),
    "instructions": st.text(max_size=10),
}


def tools(form):
    def tool(schema):
        made = {"name": "made", "parameters": schema}
        return {"type": "function", **(made if form == "flat" else {"function": made})}

    known = RESPONSE_TOOLS if form == "flat" else CHAT_TOOLS
    return st.just(known) | SCHEMAS.map(lambda schema: [*known, tool(schema)])


def formats(form):
    def made(schema):
        named = {"name": "x", "schema": schema}
        return {"type": "json_schema", **(named if form == "flat" else {"json_schema": named})}

    return st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | SCHEMAS.map(made)


@st.composite
def bodies(draw, path):
    """A body that is right but for some of its fields."""
    form = "flat" if path == RESPONSES else "nested"
    right = {**RIGHT, "tools": tools(form), "response_format": formats(form)}
    right["text"] = st.fixed_dictionaries({"format": formats(form)})
    table = RESPONSE_FIELDS if path == RESPONSES else CHAT_FIELDS
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = {"model": MODEL, limit: 4}
    body |= {"input": "Hi"} if path == RESPONSES else {"messages": [user("Hi")]}
    known = sorted(set(right) & set(table))
    for name in draw(st.lists(st.sampled_from(known), max_size=5, unique=True)):
        body[name] = draw(ANYTHING if draw(st.integers(0, 11)) == 0 else right[name])
    if draw(st.integers(0, 3)):  # what some fields need beside them
        if {"tool_choice", "parallel_tool_calls"} & set(body):
            body.setdefault("tools", draw(right["tools"]))
        if "top_logprobs" in body and path == RESPONSES:
            body["include"] = ["message.output_text.logprobs"]
        elif "top_logprobs" in body:
            body["logprobs"] = True
        if "max_completion_tokens" in body:
            del body["max_tokens"]
        body["stream"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(sorted(table)))] = draw(ANYTHING)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=8))] = draw(ANYTHING)
    return json.dumps(body).encode()


ASKED = st.sampled_from([CHAT, CHAT, RESPONSES]).flatmap(
    lambda path: st.tuples(st.just("POST"), st.just(path), bodies(path))
)
REQUESTS = st.one_of(*[ASKED] * 9) | st.tuples(
    st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    st.sampled_from(["/v1/models", "/v1/models/fake", CHAT, RESPONSES, "/v1/x", "/", "/v1//"])
    | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=9).map(
        lambda text: f"/v1/{text}"
    ),
    st.binary(max_size=20),
)


async def check_request(client, request):
    """Only 2xx with what was asked for, or 4xx with a proper body."""
    method, path, body = request
    answer = await client.request(method, path.replace("?", "").replace("#", ""), content=body)
    if 400 <= answer.status_code < 500:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"]
        return "refused"
    assert answer.status_code == 200, (answer.status_code, answer.text)
    if answer.headers["content-type"].startswith("text/event-stream"):
        check_events(answer.text, path)
        return "streamed"
    if method == "POST":
        validate = ChatCompletion if path == CHAT else Response
        validate.model_validate(answer.json(), strict=path == CHAT)
    return "answered"


def check_events(text, path):
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    if path == CHAT:
        assert events.pop() == "[DONE]"
        for event in events:
            if "error" in json.loads(event):  # a grammar that cannot be followed to its end
                assert json.loads(event)["error"]["type"] == "invalid_request_error"
            else:
                ChatCompletionChunk.model_validate_json(event, strict=True)
    else:
        kinds = [json.loads(event)["type"] for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")


@pytest.mark.timeout(1200)
def test_no_request_gets_more_than_a_refusal(tokenizer, template):
    counts = dict.fromkeys(("refused", "answered", "streamed"), 0)
    with asyncio.Runner() as runner:
        engine = scripted(tokenizer, template, [], max_context_tokens=1500)
        engine.runner.script = lambda *_: None  # noise
        runner.run(engine.__aenter__())
        http = httpx.AsyncClient(transport=transport(httpx, Api(engine)), base_url="http://agentrt")

        @settings(
            max_examples=NUM_REQUESTS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(REQUESTS)
        def fuzz(request):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydantic's, of values it takes all the same
                counts[runner.run(check_request(http, request))] += 1

        with contextlib.ExitStack() as stack:
            stack.callback(lambda: runner.run(engine.__aexit__()))
            fuzz()
            # alive, and nothing is left behind
            body = json.dumps({**PLAIN, "max_tokens": 4}).encode()
            assert runner.run(check_request(http, ("POST", CHAT, body))) == "answered"
            assert runner.run(engine.leased_blocks()) == 0
            assert engine.stats().running == engine.stats().waiting == 0
    assert min(counts.values()) > NUM_REQUESTS // 40, counts
    print(counts)  # noqa: T201 - of a long run, with -s
