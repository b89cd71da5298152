from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from agentrt import grammar, grammar_calls
from agentrt.errors import GrammarInvalid, ModelUnsupported
from agentrt.grammar import Constraint, GrammarCompiler
from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import HERMES
from agentrt.tool_arguments import bind
from agentrt.tool_prompt import render_tool_section
from agentrt.tools import Tool, ToolSet, tool
from agentrt.types import ToolCall

PADDED_VOCAB_SIZE = 421


@tool
def plan(
    city: str,
    unit: Literal["km", "mile"],
    stops: list[int],
    tags: dict[str, bool] | None = None,
    anything: Any = None,
    ratio: float = 0.5,
    pair: tuple[str, int] = ("a", 1),
) -> str:
    """Plans a trip <to a place>."""
    return ""


@tool
def now() -> str:
    """The time."""
    return ""


def tool_calls(tools: ToolSet, **shape: Any) -> str:
    return grammar_calls.tool_calls(tools, HERMES, grammar_calls.TurnShape(**shape))


def parse_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    return parse_turn(TurnParser(HERMES), text)


def render_call(call: ToolCall) -> str:
    return HERMES.render([call])


TOOLS = ToolSet([plan, now])
CALL = ToolCall("", "plan", {"city": "Oslo </tool_call> é", "unit": "km", "stops": [1, -20]})
TURN = f"Let <b>me</b> see: <tool\n{render_call(CALL)}\n{render_call(ToolCall('', 'now', {}))}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TURN, render_tool_section(TOOLS)] * 4, trainer)
    return made


@pytest.fixture(scope="module")
def end_id(tokenizer: Tokenizer) -> int:
    return int(tokenizer.token_to_id("<|im_end|>"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, end_id: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, PADDED_VOCAB_SIZE, {end_id})


def allowed(constraint: Constraint) -> list[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def takes(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the constraint takes the whole text and may end after it."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return all(constraint.accept(token) for token in tokens) and constraint.may_end


ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "numbers": {"type": "array"}},
    "required": ["street"],
}


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        (grammar.choice(["yes", 'n"o\n', "é/\\"]), ["yes", 'n"o\n', "é/\\"], ["ye", "no", ""]),
        (grammar.regex(r'a/b\d+[/]"'), ['a/b12/"'], ["a/b", "xa/b1"]),
        (grammar.lark('start: "x" | foo\nfoo: /[a-c]+/'), ["x", "abc"], ["d", ""]),
        (
            grammar.json_schema(ADDRESS),
            ['{"street": "a b", "numbers": [1, "x"]}', '{"street": ""}'],
            ['{"street":"a"}', '{"street":  "a"}', '{ "street": "a"}', '{"numbers": []}'],
        ),
    ],
)
def test_a_grammar_takes_exactly_its_texts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, good: list[str], bad: list[str]
) -> None:
    assert [each for each in good if not takes(compiler.compile(text), tokenizer, each)] == []
    assert [each for each in bad if takes(compiler.compile(text), tokenizer, each)] == []


@pytest.mark.parametrize(
    "text",
    [
        "start: missing",
        "",
        "{}",
        grammar.regex("("),
        grammar.json_schema({"type": "colour"}),
        grammar.json_schema({"type": "array", "uniqueItems": True}),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason(compiler: GrammarCompiler, text: str) -> None:
    with pytest.raises(GrammarInvalid, match=r"cannot be compiled: .+"):
        compiler.compile(text)


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(GrammarInvalid, match="choice"):
        grammar.choice([])
    with pytest.raises(GrammarInvalid, match="choice"):
        grammar.choice("ab")
    with pytest.raises(GrammarInvalid, match="tool"):
        tool_calls(ToolSet())


def test_a_vocabulary_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelUnsupported, match="vocab size too small"):
        GrammarCompiler(tokenizer, 10, [1]).compile(grammar.choice(["a"]))


def test_the_mask_of_a_choice_is_brute_force_over_its_texts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    options = ["arguments", "argument", "city", "no", "now", "name: x"]
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
    pending = [(compiler.compile(grammar.choice(options)), "")]
    while pending:
        constraint, done = pending.pop()
        expected = {
            token
            for token, text in texts.items()
            if text and any(option.startswith(done + text) for option in options)
        }
        if constraint.forced_tokens():
            assert allowed(constraint) == constraint.forced_tokens()[:1]
            assert set(allowed(constraint)) <= expected
        else:
            assert set(allowed(constraint)) == expected | ({end_id} if done in options else set())
        for token in expected:
            following = constraint.fork()
            assert following.accept(token)
            pending.append((following, done + texts[token]))


@pytest.mark.parametrize("required", [True, False])
def test_the_mask_of_a_turn_is_brute_force_over_accept(
    compiler: GrammarCompiler, tokenizer: Tokenizer, required: bool
) -> None:
    constraint = compiler.compile(tool_calls(TOOLS, required=required))
    text = TURN[TURN.index("<tool_call>") :] if required else TURN
    for token in tokenizer.encode(text).ids:
        expected = [each for each in range(PADDED_VOCAB_SIZE) if constraint.fork().accept(each)]
        forced = constraint.forced_tokens()
        assert set(forced[:1]) <= set(expected)
        assert allowed(constraint) == (forced[:1] or expected)
        assert constraint.accept(token), (token, tokenizer.decode([token]))
    assert constraint.may_end


def random_turn(
    constraint: Constraint, tokenizer: Tokenizer, end_id: int, chance: random.Random
) -> str:
    """A random walk through the masks; it leans to the tokens that end things."""
    ends = {token for text, token in tokenizer.get_vocab().items() if set(text) & set('"}]')}
    tokens: list[int] = []
    while end_id not in tokens:
        options = allowed(constraint)
        assert options
        likely = [each for each in options if each in ends or each == end_id]
        token = chance.choice(likely if likely and chance.random() < 0.3 else options)
        assert constraint.accept(token)
        tokens.append(token)
    assert constraint.is_finished
    return str(tokenizer.decode(tokens[:-1], skip_special_tokens=False))


@pytest.mark.parametrize("parallel", [True, False])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), prefix=st.sampled_from(["", "Hm. <tool_call>\n", "a<"]))
def test_every_walk_through_the_masks_is_a_turn_with_valid_calls(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    end_id: int,
    parallel: bool,
    seed: int,
    prefix: str,
) -> None:
    required = not prefix
    constraint = compiler.compile(tool_calls(TOOLS, required=required, parallel=parallel))
    for token in tokenizer.encode(prefix).ids:
        assert constraint.accept(token)
    text = prefix + random_turn(constraint, tokenizer, end_id, random.Random(seed))
    plain, calls = parse_calls(text)
    if required or "<tool_call>" in prefix:
        assert plain == prefix.removesuffix("<tool_call>\n")
        assert 1 <= len(calls) <= (grammar_calls.MAX_CALLS if parallel else 1)
    assert "<tool_call>" not in plain
    for call in calls:
        found = TOOLS.get(call.name)
        assert found is not None
        bind(found.function, found.parameters, call.arguments)


@pytest.mark.parametrize(
    ("text", "is_turn"),
    [
        ("", True),
        ("plain text, a < b and <to<tool_cal", True),
        ("<tool_callx> </tool_call>", True),
        ("<tool_call>", False),
        ("a <tool_call>\n{}", False),
        (TURN, True),
        (TURN + " and", False),
        (TURN.replace("km", "feet"), False),
        (TURN.replace('"plan"', '"plans"'), False),
        (TURN.replace("</tool_call>\n<", "</tool_call><"), False),
    ],
)
def test_what_is_a_turn(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, is_turn: bool
) -> None:
    assert takes(compiler.compile(tool_calls(TOOLS)), tokenizer, text) == is_turn


def test_required_and_parallel(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    calls = TURN[TURN.index("<tool_call>") :]
    required = tool_calls(TOOLS, required=True)
    assert takes(compiler.compile(required), tokenizer, calls)
    assert not takes(compiler.compile(required), tokenizer, TURN)
    assert not takes(compiler.compile(required), tokenizer, "")
    single = tool_calls(TOOLS, parallel=False)
    assert takes(compiler.compile(single), tokenizer, f"So: {render_call(CALL)}")
    assert not takes(compiler.compile(single), tokenizer, TURN)


@pytest.mark.parametrize(
    ("text", "is_answer"),
    [
        ("It is 3 km, a < b, <b>far</b>", True),
        ("see <tool_cal", True),
        ("", False),
        (" indented", False),
        ("<tool_call_2>", False),
        ("<b>far</b>", False),
        ("see <tool_call>", False),
    ],
)
def test_what_is_an_answer_without_calls(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, is_answer: bool
) -> None:
    assert takes(compiler.compile(grammar_calls.text_without_calls()), tokenizer, text) == is_answer


def takes_arguments(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], **arguments: Any
) -> bool:
    made = Tool(name="t", description="", parameters=schema, function=now.function)
    constraint = compiler.compile(tool_calls(ToolSet([made]), required=True))
    return takes(constraint, tokenizer, render_call(ToolCall("", "t", arguments)))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, "a" * 256, "a" * 257),
        ({"type": ["string", "null"]}, "a" * 256, "a" * 257),
        ({"type": "string", "maxLength": 300}, "a" * 300, "a" * 301),
        ({"type": "string", "minLength": 400}, "a" * 400, "a" * 401),
        ({"type": "string", "pattern": "^a{257,}$"}, "a" * 300, "a"),
        ({"type": "array", "items": {"type": "integer"}}, [1] * 16, [1] * 17),
        ({"type": "array", "items": {"type": "string"}}, ["a" * 256], ["a" * 257]),
        ({"type": "integer"}, -(10**18), 10**19),
        ({"type": "integer", "minimum": 0}, 10**18, 10**19),
        ({"type": "integer", "maximum": 10**19}, 3, 10**20),
        (
            {"type": "object", "additionalProperties": {"type": "null"}},
            {str(key): None for key in range(16)},
            {str(key): None for key in range(17)},
        ),
        ({"type": "object"}, {"k" * 64: 1}, {"k" * 65: 1}),
        ({"anyOf": [{"type": "string"}]}, "a" * 256, "a" * 257),
        ({"type": "object", "properties": {"x": {}}}, {"x": 1}, {"x": 1, "y": 1}),
        (
            {"type": "object", "properties": {"x": {}}, "additionalProperties": True},
            {"x": 1, "y": 1},
            {"y": 1, "x": 1},
        ),
        ({"enum": ["a" * 300]}, "a" * 300, "a"),
    ],
)
def test_arguments_are_bounded_where_their_schema_sets_no_bound(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], good: Any, bad: Any
) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    parameters = {**parameters, "additionalProperties": False}
    assert takes_arguments(compiler, tokenizer, parameters, a=good)
    assert not takes_arguments(compiler, tokenizer, parameters, a=bad)


def test_a_token_that_is_not_allowed_changes_nothing(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(grammar.choice(["now", "no"]))
    before = allowed(constraint)
    wrong = next(token for token in range(PADDED_VOCAB_SIZE) if token not in before)
    assert not constraint.accept(wrong)
    assert not constraint.accept(PADDED_VOCAB_SIZE - 1)
    assert allowed(constraint) == before
    assert repr(constraint) == "<Constraint tokens=0 is_finished=False>"


def test_rollback_takes_back_tokens_and_the_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    constraint = compiler.compile(tool_calls(TOOLS))
    masks = []
    tokens = [*tokenizer.encode(TURN).ids, end_id]
    for token in tokens:
        masks.append(allowed(constraint))
        assert constraint.accept(token)
    assert constraint.is_finished
    assert not constraint.accept(end_id)
    for count in (1, 5, len(tokens) - 6):
        constraint.rollback(count)
        tokens = tokens[: len(tokens) - count]
        assert allowed(constraint) == masks[len(tokens)]
    with pytest.raises(AssertionError):
        constraint.rollback(1)


@pytest.mark.parametrize("text", ["no", "now"])
def test_the_end_of_the_turn_is_taken_once_wherever_the_text_may_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int, text: str
) -> None:
    constraint = compiler.compile(grammar.choice(["no", "now"]))
    assert not constraint.accept(end_id)
    assert takes(constraint, tokenizer, text)
    assert constraint.is_finished == (text == "now")
    for _ in range(2):
        before = allowed(constraint)
        assert end_id in before
        assert constraint.accept(end_id)
        assert constraint.is_finished
        assert not constraint.accept(end_id)
        assert not constraint.fork().accept(end_id)
        constraint.rollback(1)
        assert allowed(constraint) == before
    constraint.rollback(0)
    assert constraint.accept(end_id)
    constraint.rollback(2)
    assert not constraint.accept(end_id)


def test_forks_go_their_own_ways(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(grammar.choice(["now", "city"]))
    fork = constraint.fork()
    assert takes(constraint, tokenizer, "now")
    assert takes(fork, tokenizer, "city")


def test_forced_tokens_are_the_tokenizers_own(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_id: int
) -> None:
    constraint = compiler.compile(tool_calls(ToolSet([now]), required=True))
    forced = constraint.forced_tokens()
    expected = render_call(ToolCall("", "now", {}))
    assert expected.startswith(tokenizer.decode(forced))
    assert len(tokenizer.decode(forced)) > 20
    assert forced == tokenizer.encode(expected).ids[: len(forced)]
    free = compiler.compile(tool_calls(TOOLS))
    assert free.forced_tokens() == []
    assert free.accept(end_id)
    assert free.forced_tokens() == []


def follow(constraint: Constraint, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text).ids:
        constraint.mask()
        constraint.accept(token)


def test_a_grammar_too_complex_to_follow_fails_its_caller(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    many = " | ".join(f'"x" b{n}' for n in range(3000))
    rules = "\n".join(f'b{n}: "y{n}"' for n in range(3000))
    constraint = compiler.compile(f"start: a\na: {many}\n{rules}\n")
    with pytest.raises(GrammarInvalid, match="cannot be followed"):
        follow(constraint, tokenizer, "xy1")


def test_threads_may_compile_at_once(compiler: GrammarCompiler) -> None:
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        barrier.wait()
        for number in range(30):
            assert allowed(compiler.compile(grammar.choice([f"{number % 7}", f"{index}"])))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
