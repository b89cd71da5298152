"""The logs of conversations that come back as messages: which one is found, and what is kept."""

import asyncio

import pytest
from openai_wire import CHAT_TOOLS, MODEL, user
from scripted import call_text, scripted

from agentrt.adapters.openai import affinity
from agentrt.adapters.openai.affinity import Affinity, conversation_of
from agentrt.token_log import TokenLog
from agentrt.types import Message


def log_of(tokenizer, *texts):
    log = TokenLog(tokenizer)
    for text in texts:
        log.append_generated(tokenizer.encode(text), text)
    return log


def messages(*texts):
    roles = ("system", "user", "assistant", "user")
    return [Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)]


def test_a_conversation_is_told_by_its_name_and_how_it_begins():
    first = conversation_of(None, messages("be kind", "hi"))
    assert conversation_of(None, messages("be kind", "hi", "hello", "more")) == first
    assert conversation_of(None, messages("be kind", "ho")) != first
    assert conversation_of("x", messages("be kind", "hi")) != first
    # the border between two messages tells too
    assert conversation_of(None, messages("be kin", "dhi")) != first


async def test_the_log_with_most_in_common_is_found(tokenizer, template):
    async with scripted(tokenizer, template, []) as engine:
        logs, talk = Affinity(engine, tokenizer), conversation_of(None, messages("", "hi"))
        assert (await logs.log_of(talk, "anything")).ids == []
        await logs.keep(talk, log_of(tokenizer, "one ", "two "))
        await logs.keep(talk, log_of(tokenizer, "one ", "three "))
        assert (await logs.log_of(talk, "one three four")).text == "one three "
        found = await logs.log_of(talk, "one two four")
        found.update("one two four")  # a copy: the kept one is as it was
        assert (await logs.log_of(talk, "one two five")).text == "one two "
        # what goes on from a log takes its place
        await logs.keep(talk, found)
        assert (await logs.log_of(talk, "one two five")).text == "one two four"
        logs.check()


async def test_what_is_kept_is_bounded(tokenizer, template, monkeypatch):
    monkeypatch.setattr(affinity, "MOST_TOKENS", 100)
    async with scripted(tokenizer, template, []) as engine:
        logs = Affinity(engine, tokenizer)
        talks = [conversation_of(str(i), messages("", "hi")) for i in range(3)]
        for talk in talks[:2]:
            await logs.keep(talk, log_of(tokenizer, "x" * 45), ["add"])
        await logs.log_of(talks[0], "x")  # used: the other one is older now
        await logs.keep(talks[2], log_of(tokenizer, "x" * 45))
        logs.check()
        assert [len((await logs.log_of(talk, "x")).ids) for talk in talks] == [45, 0, 45]
        for i in range(20):
            await logs.keep(talks[2], log_of(tokenizer, f"{i}"))
            logs.check()
        assert len(logs._logs[talks[2]]) == affinity.MOST_BRANCHES
        await logs.aclose()
        logs.check()
        assert await pauses(engine) == 0


async def pauses(engine):
    loop = engine._open.loop
    return await asyncio.wrap_future(loop.call(lambda: len(loop.scheduler.pauses._pauses)))


@pytest.mark.parametrize("name", ["a customer", None])
async def test_only_a_named_conversation_pauses_for_its_tools(tokenizer, template, name):
    calls = [call_text("add", '{"a": 1, "b": 1}'), call_text("add", '{"a": 2, "b": 2}')]
    async with (
        scripted(tokenizer, template, ["\n".join(calls)]) as engine,
        engine.openai() as client,
    ):
        fields = {} if name is None else {"prompt_cache_key": name}
        await client.chat.completions.create(
            model=MODEL, messages=[user("Hi")], temperature=0, tools=CHAT_TOOLS, **fields
        )
        assert await pauses(engine) == (0 if name is None else 2)
        await client.close()  # nobody will come back with the results
        assert await pauses(engine) == 0


async def test_an_answer_may_be_asked_for_again(tokenizer, template):
    """The same messages once more, as after a dislike: the history before stays the model's own."""
    async with scripted(tokenizer, template, ["one", "two", "three"]) as engine:
        client = engine.openai()

        async def ask(*said):
            answer = await client.chat.completions.create(
                model=MODEL, messages=list(said), temperature=0
            )
            return answer.choices[0].message, answer.usage

        first, _ = await ask(user("Hi"))
        second, _ = await ask(user("Hi"), first, user("More"))
        third, usage = await ask(user("Hi"), first, user("More"))
        assert (second.content, third.content) == ("two", "three")
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
