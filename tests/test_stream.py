"""TokenStream: order, merging for slow consumers, errors, cancelling."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt import Completion, Finished, TextDelta, Usage
from agentrt.errors import EngineFailed
from agentrt.stream import TokenStream


def finished(text="done"):
    usage = Usage(prompt_tokens=1, cached_tokens={}, output_tokens=1, ttft_s=0.0, total_s=0.0)
    return Finished(
        Completion(request_id="r", token_ids=(1,), text=text, finish_reason="stop", usage=usage)
    )


class Cancels:
    """Counts how often the stream asked to cancel."""

    def __init__(self):
        self.count = 0
        self.stream = TokenStream(self)

    def __call__(self):
        self.count += 1


async def test_a_reader_that_keeps_up_sees_every_delta():
    stream, seen = Cancels().stream, []

    async def read():
        async for event in stream:
            seen.append(event)  # noqa: PERF401 - one by one is what is tested

    reader = asyncio.create_task(read())
    events = [TextDelta("a", (1,)), TextDelta("b", (2, 3)), finished()]
    for event in events:
        stream.deliver(event)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await reader
    assert seen == events


@given(st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3))))
def test_merged_deltas_lose_nothing(parts):
    async def main():
        stream = Cancels().stream
        for text, ids in parts:
            stream.deliver(TextDelta(text, tuple(ids)))
        stream.deliver(finished())
        return [event async for event in stream]

    *deltas, last = asyncio.run(main())
    assert last == finished()
    assert len(deltas) == min(1, len(parts))
    assert "".join(delta.text for delta in deltas) == "".join(text for text, _ in parts)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert ids == [token for _, part in parts for token in part]


async def test_an_error_comes_after_the_text_before_it():
    stream = Cancels().stream
    stream.deliver(TextDelta("a", (1,)))
    stream.deliver(EngineFailed("broken"))
    assert await anext(stream) == TextDelta("a", (1,))
    with pytest.raises(EngineFailed, match="broken"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_collect_waits_for_the_completion():
    cancels = Cancels()
    collecting = asyncio.create_task(cancels.stream.collect())
    for event in (TextDelta("a", (1,)), TextDelta("b", (2,)), finished("ab")):
        await asyncio.sleep(0)
        cancels.stream.deliver(event)
    assert (await collecting).text == "ab"
    assert cancels.count == 0


async def test_collect_raises_the_error():
    stream = Cancels().stream
    stream.deliver(EngineFailed("broken"))
    with pytest.raises(EngineFailed, match="broken"):
        await stream.collect()


async def test_cancelling_collect_cancels_the_request():
    cancels = Cancels()
    collecting = asyncio.create_task(cancels.stream.collect())
    await asyncio.sleep(0)
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert cancels.count == 1


def test_closing_cancels_only_what_has_not_ended():
    async def main():
        early, late = Cancels(), Cancels()
        early.stream.close()
        late.stream.deliver(finished())
        late.stream.close()
        return early.count, late.count

    assert asyncio.run(main()) == (1, 0)
