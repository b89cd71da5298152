"""Guards: nothing is seen before they decided it, however the text is cut."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Script, call_text, scripted

from agentrt import (
    Finished,
    GenerateOptions,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallDelta,
    ToolResult,
    TurnFinished,
    tool,
)
from agentrt.errors import GuardStopped, RequestInvalid
from agentrt.guards import GuardedText, GuardView, Pass, Redact, Replace, Span, Stop, guarded
from agentrt.guards_classifier import ClassifierGuard
from agentrt.guards_patterns import (
    EMAIL,
    SECRETS,
    Pattern,
    PatternGuard,
    PrivateKeys,
    redact_emails,
    redact_secrets,
)
from agentrt.template import ChatTemplate

PLENTY = GenerateOptions(max_tokens=400)
KEY = "sk-" + "a1B2" * 8
cuts = st.lists(st.integers(1, 7), min_size=1, max_size=8)
words = st.lists(
    st.sampled_from(
        ["a", "@", ".", "x@y.com", "ann.lee@mail.example.org", "sk-", KEY, "AKIA" + "A1" * 8, " ",
         "\n", f"eyJ{'a' * 9}.{'b' * 9}.{'c' * 9}", "-", "_", "é", "b" * 30, "hf_",
         "-----BEGIN ", "RSA PRIVATE KEY", "-----", "-----END ", "Ab+/" * 16]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def pieces_of(text: str, sizes: list[int]) -> list[str]:
    pieces, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return pieces


def passed(guards: list[Any], pieces: list[str]) -> tuple[list[str], GuardedText]:
    async def run() -> tuple[list[str], GuardedText]:
        text = GuardedText(guards, "answer")
        shown = [await text.push(piece) for piece in pieces]
        return [*shown, await text.finish()], text

    return asyncio.run(run())


# ---- redaction by pattern


@settings(max_examples=300, deadline=None)
@given(words, cuts)
def test_a_pattern_guard_does_what_it_would_do_to_the_whole_text(text, sizes) -> None:
    guards = [redact_emails(), redact_secrets()]
    whole = "".join(passed(guards, [text] if text else [])[0])
    shown, passing = passed(guards, pieces_of(text, sizes))
    assert "".join(shown) == whole == passing.shown
    assert passing.is_changed == (whole != text)
    for pattern in (EMAIL, *SECRETS):
        assert pattern.find(whole, 0) is None or "[" in whole


@settings(max_examples=200, deadline=None)
@given(st.text("ab1 ", max_size=40), cuts, st.booleans())
def test_any_bounded_pattern_is_found_in_any_cut(text, sizes, has_spaces) -> None:
    regex = re.compile(r"a[ab ]{0,4}1" if has_spaces else r"(?<!b)a[ab]{0,4}1(?!1)")
    pattern = Pattern(name="x", regex=regex, longest_characters=6, has_spaces=has_spaces)
    guard = PatternGuard(patterns=[pattern])
    shown, _ = passed([guard], pieces_of(text, sizes))
    assert "".join(shown) == regex.sub("[x]", text)


def test_only_the_last_word_is_held_back() -> None:
    shown, _ = passed([redact_emails()], ["Write to ann@", "mail.org or ", "come."])
    assert shown == ["Write to ", "[e-mail] or ", "", "come."]


def test_a_word_that_never_ends_is_held_back_up_to_the_longest_match() -> None:
    shown, _ = passed([redact_emails()], ["x" * 2000])
    assert len(shown[0]) == 2000 - EMAIL.longest_characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail ann.lee+x@mail.example.org.", "mail [e-mail]."),
        ("<a@b.co>, c@d", "<[e-mail]>, c@d"),
        (f"the key {KEY}, twice {KEY}", "the key [key], twice [key]"),
        ("ghp_" + "x" * 36, "[key]"),
        ("task-force and sk-learn stay", "task-force and sk-learn stay"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
    ],
)
def test_what_is_redacted(text: str, expected: str) -> None:
    assert "".join(passed([redact_emails(), redact_secrets()], [text])[0]) == expected


def pem(label: str = "RSA PRIVATE KEY", *, num_lines: int = 26, newline: str = "\n") -> str:
    lines = [
        f"-----BEGIN {label}-----",
        *["Ab+/" * 16] * num_lines,
        "Zg==",
        f"-----END {label}-----",
    ]
    return newline.join(lines)


@pytest.mark.parametrize(
    "block",
    [
        pem(),
        pem("PRIVATE KEY", newline="\r\n"),
        pem("OPENSSH PRIVATE KEY", num_lines=100),
        pem("EC PRIVATE KEY", newline="\\n"),
        pem("ENCRYPTED PRIVATE KEY", num_lines=0),
        pem().replace(
            "-----\n", "-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,0A9F\n\n", 1
        ),
        pem("PGP PRIVATE KEY BLOCK").replace(
            "-----\n", "-----\nVersion: GnuPG v2.0 (Linux)\n\n", 1
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 17, 100_000])
def test_private_keys_are_redacted_however_long(block: str, size: int) -> None:
    text = f"It is\n{block}\nKeep it -- safe."
    shown, passing = passed([redact_secrets()], pieces_of(text, [size]))
    assert "".join(shown) == "It is\n[private key]\nKeep it -- safe."
    assert passing.stopped is None


def test_a_private_key_without_an_end_goes_up_to_what_no_key_has() -> None:
    cut = pem().split("-----END")[0]
    for size in (1, 5, 10_000):
        shown, _ = passed([redact_secrets()], pieces_of(f"Key: {cut}", [size]))
        assert "".join(shown) == "Key: [private key]"
        shown, _ = passed([redact_secrets()], pieces_of(f"Key: {cut} (cut) off", [size]))
        assert "".join(shown) == "Key: [private key](cut) off"


def test_what_only_looks_like_a_private_key_is_shown_and_little_is_held_back() -> None:
    public = pem("PUBLIC KEY", num_lines=2)
    text = f"A rule -----\n{public}\n----- and -----BEGIN of text, -----BEGIN PRIVATE parts."
    for size in (1, 4, 10_000):
        shown, _ = passed([redact_secrets()], pieces_of(text, [size]))
        assert "".join(shown) == text
    shown, _ = passed([PatternGuard(patterns=[PrivateKeys()])], ["one - two ", "--", "-- three"])
    assert shown == ["one - two ", "", "---- three", ""]
    shown, _ = passed([PatternGuard(patterns=[PrivateKeys()])], ["-----BEGIN" + " A" * 500])
    assert len(shown[0]) > 1000


def test_a_pattern_needs_a_bound() -> None:
    with pytest.raises(RequestInvalid, match="longest_characters"):
        Pattern(name="x", regex=re.compile("a"), longest_characters=0)


# ---- any guards


class RandomGuard:
    """Decides by a list of numbers; keeps what it let through, and what it must not be seen."""

    def __init__(self, decisions: list[int]) -> None:
        self._decisions = decisions
        self._turn = 0

    async def __call__(self, view: GuardView) -> Any:
        number = self._decisions[self._turn % len(self._decisions)]
        self._turn += 1
        if number % 3 == 0:
            await asyncio.sleep(0)
        secret = view.text.rfind("S", view.start)
        keep = number % 5
        if number == 97:
            return Stop("random")
        if secret < 0:
            return Pass(keep) if number % 7 else Replace("r")
        spans = [
            Span(at, at + 1, "*")
            for at in range(view.start, len(view.text))
            if view.text[at] == "S"
        ]
        return Redact(spans, keep) if number % 4 else Replace("r")


@settings(max_examples=200, deadline=None)
@given(
    st.text("aS ", max_size=40),
    cuts,
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_no_guarded_text_is_seen_whatever_guards_decide(text, sizes, decisions) -> None:
    shown, passing = passed([RandomGuard(each) for each in decisions], pieces_of(text, sizes))
    seen = "".join(shown)
    assert "S" not in seen
    assert passing.shown == seen
    if passing.stopped is None and "r" not in seen:
        assert seen == text.replace("S", "*")


async def test_a_chain_sees_what_the_guard_before_it_lets_through() -> None:
    seen: list[str] = []

    async def note(view: GuardView) -> Pass:
        seen.append(view.window)
        return Pass()

    shown, stopped = await guarded("to a@b.co now", [redact_emails(), note], "answer")
    assert (shown, stopped, seen) == ("to [e-mail] now", None, ["to [e-mail] now"])


async def test_wrong_verdicts_are_refused() -> None:
    async def nothing(_: GuardView) -> None:
        return None

    async def outside(_: GuardView) -> Redact:
        return Redact([Span(0, 99, "")])

    for guard in (nothing, outside):
        with pytest.raises(RequestInvalid, match="guard"):
            await guarded("text", [guard], "answer")


async def test_a_classifier_decides_sentence_by_sentence() -> None:
    asked: list[str] = []

    async def classify(text: str) -> str | None:
        asked.append(text)
        return next((label for label in ("rude", "leak") if label in text), None)

    guard = ClassifierGuard(
        classify=classify, replies={"rude": " Sorry."}, stops={"leak": "a leak"},
        longest_characters=30,
    )  # fmt: skip
    text = GuardedText([guard], "answer")
    assert await text.push("All is ") == ""
    assert await text.push("well. That is rude") == "All is well."
    assert await text.push("! Next") == " Sorry."
    assert await text.push(" is. ") == " Next is."
    assert await text.push("x" * 40) == " " + "x" * 40
    assert await text.push(" a leak") == ""
    assert await text.finish() == ""
    assert text.stopped == Stop("a leak")
    assert asked[0] == "All is well."


# ---- in an engine


def guarded_script(tokenizer, template, texts, output_guards=(), input_guards=()):
    engine = scripted(tokenizer, template, texts)
    engine.output_guards, engine.input_guards = tuple(output_guards), tuple(input_guards)
    return engine


async def stop_at_bad(view: GuardView) -> Any:
    """Holds two characters back, and stops at "bad"."""
    if "bad" in view.window:
        return Stop("bad word")
    return Pass(2)


class Counted:
    """What a piece of code costs: functions of guards that it enters, and tasks that it makes."""

    FILES = ("guards.py", "guards_patterns.py", "guards_classifier.py", "screen.py")

    def __enter__(self) -> Counted:
        self.entered: Counter[str] = Counter()
        self.num_tasks = 0
        loop = asyncio.get_running_loop()
        self._factory = loop.get_task_factory()
        loop.set_task_factory(self._task)
        sys.setprofile(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        asyncio.get_running_loop().set_task_factory(self._factory)

    def _enter(self, frame: Any, event: str, _: object) -> None:
        name = Path(frame.f_code.co_filename).name
        if event == "call" and name in self.FILES:
            self.entered[f"{name}: {frame.f_code.co_name}"] += 1

    def _task(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        self.num_tasks += 1
        if self._factory is not None:
            return self._factory(loop, coroutine, **options)
        return asyncio.Task(coroutine, loop=loop, **options)


async def test_without_guards_there_is_no_call_and_no_task_for_them(tokenizer, template) -> None:
    texts = ["words " * 20] * 5
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(options=PLENTY)
        with Counted() as counted:
            await engine.generate("hi", PLENTY)
            [event async for event in engine.stream("hi", PLENTY)]
            await session.run("hi")
        assert counted.entered == {}
        assert counted.num_tasks == 0
        engine.output_guards = (stop_at_bad,)
        guarded_session = engine.session(options=PLENTY)
        with Counted() as counted:
            await guarded_session.run("hi")
        assert counted.entered["screen.py: push"] > 1  # so it does count


async def test_an_engines_guards_see_prompts_and_outputs(tokenizer, template) -> None:
    texts = ["mail a@b.co now", "mail a@b.co now", "all good", "not so bad at all", "so bad"]
    guards = {"output_guards": [redact_emails(), stop_at_bad], "input_guards": [redact_emails()]}
    async with guarded_script(tokenizer, template, texts, **guards) as engine:
        done = await engine.generate("hi", PLENTY)
        assert (done.text, done.token_ids) == ("mail [e-mail] now", ())
        events = [event async for event in engine.stream("hi", PLENTY)]
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "mail [e-mail] now"
        assert not any(e.token_ids for e in events if isinstance(e, TextDelta))
        assert isinstance(events[-1], Finished)
        assert (events[-1].completion.text, events[-1].completion.token_ids) == (done.text, ())
        done = await engine.generate("hi a@b.co", PLENTY)
        assert done.usage.prompt_tokens == len("hi [e-mail]")
        assert done.token_ids
        seen = ""
        with pytest.raises(GuardStopped, match="bad word"):  # noqa: PT012 - what came before
            async for event in engine.stream("hi", PLENTY):
                seen += event.text
        assert "not so ".startswith(seen)  # deltas may come merged, and then none of them goes
        with pytest.raises(GuardStopped, match="bad word"):
            await engine.generate("hi", PLENTY)
        assert await engine.leased_blocks() == 0


async def test_an_input_guard_stops_a_prompt(tokenizer, template) -> None:
    async with guarded_script(tokenizer, template, [], input_guards=[stop_at_bad]) as engine:
        for prompt in ("a bad one", tokenizer.encode("a bad one")):
            with pytest.raises(GuardStopped, match="bad word"):
                await engine.generate(prompt, PLENTY)
            with pytest.raises(GuardStopped, match="bad word"):
                _ = [event async for event in engine.stream(prompt, PLENTY)]
        async with engine.session(options=PLENTY) as session:
            reply = await session.run("a bad one")
            assert (reply.text, reply.finish_reason, reply.reason) == ("", "guard", "bad word")
            assert session.messages == []


# ---- in a session


@tool
async def look_up(mail: str) -> str:
    """Looks up a mail."""
    return f"{mail} belongs to key {KEY}"


async def test_nothing_of_a_session_shows_what_was_redacted(tokenizer, template) -> None:
    texts = ["I ask a@b.co: " + call_text("look_up", '{"mail": "c@d.org"}'), "It is e@f.com."]
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(
            tools=[look_up], options=PLENTY, output_guards=[redact_emails()],
            input_guards=[redact_emails(), redact_secrets()],
        )  # fmt: skip
        events = [event async for event in session.stream("My mail is x@y.com")]
        seen = repr(events) + repr(session.messages)
        assert not re.search(r"\w@\w", seen)
        assert KEY not in seen
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == (
            "I ask [e-mail]: It is [e-mail]."
        )
        assert not any(isinstance(event, ToolCallDelta) for event in events)
        (call,) = [event.call for event in events if isinstance(event, ToolCallArguments)]
        assert call.arguments == {"mail": "[e-mail]"}
        (result,) = [event for event in events if isinstance(event, ToolResult)]
        assert result.content == "[e-mail] belongs to key [key]"
        contents = [message.content for message in session.messages]
        assert contents == [
            "My mail is [e-mail]",
            "I ask [e-mail]: " + call_text("look_up", '{"mail": "[e-mail]"}'),
            "[e-mail] belongs to key [key]",
            "It is [e-mail].",
        ]
        engine.runner.script = Script(tokenizer, ["Fine."])
        await session.run("And?")
        assert not re.search(r"\w@\w", tokenizer.decode(session.token_ids))


async def test_a_stop_ends_the_turn(tokenizer, template) -> None:
    async with scripted(tokenizer, template, ["Then bad things", "fine"]) as engine:
        session = engine.session(options=PLENTY, output_guards=[stop_at_bad])
        events = [event async for event in session.stream("go")]
        shown = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert "Then ".startswith(shown)
        assert events[-1] == TurnFinished(shown, "guard", 0, reason="bad word")
        assert [message.content for message in session.messages] == ["go", shown.rstrip()]
        assert (await session.run("on")).text == "fine"
        assert await engine.leased_blocks() == 0


async def test_a_stop_cancels_the_calls_of_its_step(tokenizer, template) -> None:
    happened: list[str] = []

    @tool
    async def act() -> str:
        """Acts."""
        happened.append("began")
        try:
            await asyncio.Event().wait()
        finally:
            happened.append("cancelled")

    @tool(idempotent=False)
    async def book() -> str:
        """Books."""
        happened.append("booked")
        return "booked"

    async def stop_at_book(view: GuardView) -> Any:
        return Stop("no booking") if "book" in view.text else Pass()

    calls = [call_text("act", "{}"), call_text("book", "{}")]
    async with scripted(tokenizer, template, ["\n".join(calls), "fine"]) as engine:
        session = engine.session(tools=[act, book], options=PLENTY, output_guards=[stop_at_book])
        reply = await session.run("go")
        assert (reply.finish_reason, reply.reason) == ("guard", "no booking")
        assert happened in ([], ["began", "cancelled"])  # as the first call came before, or not
        assert (await session.run("on")).text == "fine"


async def test_a_stop_at_a_result_withholds_it(tokenizer, template) -> None:
    @tool
    async def speak() -> str:
        """Speaks."""
        return "a bad word"

    texts = [call_text("speak", "{}"), "never"]
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(tools=[speak], options=PLENTY, input_guards=[stop_at_bad])
        reply = await session.run("go")
        assert (reply.finish_reason, reply.reason) == ("guard", "bad word")
        assert reply.steps[0].results[0].content == "Error: the result was withheld: bad word"
        assert session.messages[-1].content == "Error: the result was withheld: bad word"


async def test_reasoning_is_guarded_too(tokenizer) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    texts = ["<think>\nwrite to a@b.co\n</think>\n\nDone."]
    async with scripted(tokenizer, ChatTemplate(source), texts) as engine:
        plain = engine.session(options=PLENTY)
        reply = await plain.run("go")
        assert (reply.text, reply.reasoning) == ("Done.", "write to a@b.co\n")
        engine.runner.script = Script(tokenizer, texts)
        session = engine.session(options=PLENTY, output_guards=[redact_emails()])
        events = [event async for event in session.stream("go")]
        thought = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
        assert thought == events[-1].reasoning == "write to [e-mail]\n"
        assert events[-1].text == "Done."


@pytest.mark.parametrize("stage", range(1, 6))  # a turn asks at least five times
async def test_cancelling_in_a_guard_leaks_nothing(tokenizer, template, stage) -> None:
    asked = 0
    reached = asyncio.Event()

    async def wait(view: GuardView) -> Pass:
        nonlocal asked
        asked += 1
        if asked == stage:
            reached.set()
            await asyncio.Event().wait()
        return Pass()

    texts = ["Hm. " + call_text("look_up", '{"mail": "m"}'), "Yes."]
    async with scripted(tokenizer, template, texts) as engine:
        session = engine.session(
            tools=[look_up], options=PLENTY, output_guards=[wait], input_guards=[wait]
        )
        others = asyncio.all_tasks()
        task = asyncio.create_task(session.run("go"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.messages == []
        assert await engine.leased_blocks() == 0
        assert asyncio.all_tasks() == others
