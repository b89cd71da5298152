"""The same API on a port: real sockets on loopback, the client of `openai`, and the command."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
import uvicorn
from fakes import until
from openai_wire import MODEL, user
from scripted import scripted

from agentrt.__main__ import main
from agentrt.adapters.openai import Api
from agentrt.adapters.openai.server import Application, is_loopback
from agentrt.cli_serve import run
from agentrt.config import default_cache_dir

TOKEN = "a token of some length"


@asynccontextmanager
async def served(engine, **settings):
    """The engine on a port: its URL, and the task that serves. Ended as SIGTERM would end it."""
    application = Application(api=Api(engine), **settings)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(run(uvicorn, application, listener))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", serving
    finally:
        if not serving.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await serving


def client_of(url, **settings):
    return openai.AsyncOpenAI(
        **{"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 20, **settings}
    )


async def ask(client, **fields):
    fields = {"model": MODEL, "messages": [user("Hi")], "temperature": 0, **fields}
    return await client.chat.completions.create(**fields)


async def test_answers_and_streams_are_those_of_the_client_in_process(tokenizer, template):
    async with (
        scripted(tokenizer, template, ["Hello!"] * 3) as engine,
        served(engine) as (url, _),
        client_of(url) as client,
    ):
        whole = await ask(client)
        assert whole.choices == (await ask(engine.openai())).choices
        stream = await ask(client, stream=True, stream_options={"include_usage": True})
        *parts, last = [chunk async for chunk in stream]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello!"
        assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_events_leave_as_they_are_made(tokenizer, template):
    """The first one is there while the engine still stands before its next step."""
    async with (
        scripted(tokenizer, template, ["Hello!"]) as engine,
        served(engine) as (url, _),
        client_of(url) as client,
    ):
        engine.gate.close()
        asking = asyncio.create_task(ask(client, stream=True))
        await until(lambda: engine.stats().running == 1)
        engine.gate.allow(2)  # the prompt, and one token more at most
        stream = await asking
        first = await anext(stream)
        assert "Hello!".startswith(first.choices[0].delta.content)
        assert engine.stats().running == 1
        engine.gate.open()
        rest = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert first.choices[0].delta.content + "".join(rest) == "Hello!"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_leaves_frees_its_request(tokenizer, template, streams):
    async with (
        scripted(tokenizer, template, ["word " * 100]) as engine,
        served(engine) as (url, _),
        client_of(url) as client,
    ):
        engine.gate.close()
        asking = asyncio.create_task(ask(client, stream=streams))
        await until(lambda: engine.stats().running == 1)
        if streams:
            engine.gate.allow(2)
            await anext(await asking)
        asking.cancel()
        await client.close()
        engine.gate.open()
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().cancelled == 1
        assert await engine.leased_blocks() == 0


async def test_a_token_is_asked_for(tokenizer, template):
    async with (
        scripted(tokenizer, template, ["Hello!"]) as engine,
        served(engine, token=TOKEN) as (url, _),
    ):
        for wrong in ("none", TOKEN[:-1], TOKEN + "x"):
            async with client_of(url, api_key=wrong) as client:
                with pytest.raises(openai.AuthenticationError) as refused:
                    await ask(client)
                assert refused.value.code == "invalid_api_key"
                assert refused.value.response.headers["www-authenticate"] == "Bearer"
        async with client_of(url, api_key=TOKEN) as client:
            assert (await ask(client)).choices[0].message.content == "Hello!"


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"host": ""}]
)
async def test_without_a_token_web_pages_get_nothing(tokenizer, template, headers):
    async with (
        scripted(tokenizer, template, []) as engine,
        served(engine) as (url, _),
        httpx.AsyncClient(trust_env=False) as http,
    ):
        answer = await http.get(f"{url}/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


async def test_a_body_that_is_too_long_is_refused(tokenizer, template):
    async def in_parts():  # its length is not told
        for _ in range(20):
            yield b" " * 1000

    async with (
        scripted(tokenizer, template, ["Hello!"]) as engine,
        served(engine, most_body_bytes=10_000) as (url, _),
        client_of(url) as client,
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            await ask(client, user="x" * 10_000)
        assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(f"{url}/chat/completions", content=in_parts())
            assert (answer.status_code, answer.headers["connection"]) == (413, "close")
        assert (await ask(client)).choices[0].message.content == "Hello!"


async def test_more_requests_than_the_limit_may_be_tried_again(tokenizer, template):
    async with (
        scripted(tokenizer, template, ["a", "b", "c"]) as engine,
        served(engine, most_requests=2) as (url, _),
        client_of(url) as client,
    ):
        engine.gate.close()
        running = [asyncio.create_task(ask(client)) for _ in range(2)]
        await until(lambda: engine._open.loop.num_queued == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(client)
        assert refused.value.response.headers["x-should-retry"] == "true"
        engine.gate.open()
        await asyncio.gather(*running)
        assert (await ask(client)).choices[0].message.content == "c"


async def test_an_orderly_end_lets_running_turns_end(tokenizer, template):
    async with (
        scripted(tokenizer, template, ["Hello, you!"]) as engine,
        served(engine) as (url, serving),
        client_of(url) as client,
    ):
        engine.gate.close()
        stream_task = asyncio.create_task(ask(client, stream=True))
        await until(lambda: engine.stats().running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        async with httpx.AsyncClient(trust_env=False) as http:
            while True:  # until the port is closed: nobody new is let in
                try:
                    await http.get(f"{url}/models")
                except httpx.ConnectError:
                    break
                except (httpx.ReadError, httpx.RemoteProtocolError):
                    pass  # it came in the moment in which the port was closed: no answer
                await asyncio.sleep(0.01)
        assert not serving.done()
        engine.gate.open()
        chunks = [chunk async for chunk in await stream_task]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello, you!"
        await serving


async def test_a_failure_of_ours_is_an_error_body_too(tokenizer, template, caplog):
    async with (
        scripted(tokenizer, template, []) as engine,
        served(engine) as (url, _),
        client_of(url) as client,
    ):
        engine.text.template = "not a template"
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            await ask(client)
        assert "a request failed" in caplog.text
        assert "AttributeError" in caplog.text


def test_loopback_is_what_only_this_machine_reaches():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.9.1", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.com", ""]))


# ---- the command


def test_a_port_for_others_needs_a_token(tmp_path, capsys):
    short = tmp_path / "token"
    short.write_text("short")
    for options in (["--host", "0.0.0.0"], ["--token-file", str(short)], ["--port", "99999"]):
        assert main(["serve", *options]) == 1
        assert "--" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_serve_answers_on_a_port_and_ends_on_sigterm(tmp_path):
    for name in ("models", "kernels"):  # fetched and compiled once; the disk tier is empty
        folder = default_cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    process = subprocess.Popen(
        [sys.executable, "-m", "agentrt", "serve", "--port", "0", "--token-file", str(token)],
        env={**os.environ, "AGENTRT_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        served_at = re.fullmatch(r"serving smollm2-135m at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert served_at is not None, (line, process.stderr.read())
        with openai.OpenAI(base_url=served_at[1], api_key=TOKEN) as client:
            answer = client.chat.completions.create(
                model="smollm2-135m",
                messages=[user("What is the capital of France?")],
                temperature=0,
                max_tokens=20,
            )
        assert "Paris" in answer.choices[0].message.content
    finally:
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
