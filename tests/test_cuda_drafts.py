"""Drafts on the CUDA path (interpreted without a GPU): fewer steps, and the tokens that come
without them. Draft rows go through other kernels than rows alone: where two tokens are all but
equally likely, either may come, and what follows then is another text."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from fakes import make_request
from gpu import DEVICE, HAS_GPU, interpreted
from interpreted import Drive, open_runner, small_config
from told import Told, told

from agentrt import GenerateOptions
from agentrt.cuda_runner import CUDA_LIMITS, CudaRunner
from agentrt.decode_works import DecodeWorks
from agentrt.grammar import GrammarCompiler, lark
from agentrt.kernels import Segment
from agentrt.request import Request
from agentrt.scheduler import Work
from agentrt.speculate import Drafter
from agentrt.step_rows import draws, mixed_work, right_run

pytestmark = interpreted

NEAR = 0.1  # of two logits
PROMPTS = [[40, 41, 42, 43], [90, 80, 70]]
ORDER = lark('start: "<order=" /[0-9]{3}/ ">" /[a-z]{3}/ "</>"')
LONG_PROMPT = [(7 * i + i * i // 3) % 250 for i in range(100)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaRunner]:
    opened = open_runner(tmp_path_factory.mktemp("shape"), small_config())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain(runner: CudaRunner) -> list[list[int]]:
    """What follows PROMPTS, without drafts."""
    return Drive(runner, None).run(requests_of(PROMPTS, 26))


def requests_of(prompts: Sequence[list[int]], num_tokens: int, **options) -> list[Request]:
    wanted = GenerateOptions(max_tokens=num_tokens, ignore_eos=True, **options)
    return [make_request(prompt, num_tokens, options=wanted) for prompt in prompts]


def logits_behind(runner: CudaRunner, tokens: list[int]) -> torch.Tensor:
    """Of the last token, computed as one chunk."""
    blocks = tuple(range(len(tokens) // 16 + 1))
    kv = torch.zeros(1, 2, len(blocks), 1, 16, 16, dtype=torch.bfloat16, device=DEVICE)
    ids, rows = torch.tensor(tokens, device=DEVICE), torch.arange(len(tokens), device=DEVICE)
    with torch.inference_mode():
        return runner.model.forward(ids, rows, (Segment(0, len(tokens), 0, blocks),), kv, rows[-1:])


def assert_same(
    runner: CudaRunner, prompts: Sequence[list[int]], plain: list[list[int]], got: list[list[int]]
) -> None:
    """Token for token, up to one that another comes near to."""
    for prompt, one, other in zip(prompts, plain, got, strict=True):
        assert len(one) == len(other)
        differ = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if differ is not None:
            logits = logits_behind(runner, prompt + one[:differ])[0]
            assert abs(float(logits[one[differ]] - logits[other[differ]])) < NEAR


def test_right_drafts_at_the_borders_of_blocks(runner: CudaRunner) -> None:
    """Blocks of 16 tokens, entered by every row of a draft."""
    prompts = [[3 * n + i for i in range(12 + n)] for n in range(4)]
    before = Drive(runner, None)
    plain = before.run(requests_of(prompts, 20))
    drive = Drive(runner, told(prompts, plain))
    got = drive.run(requests_of(prompts, 20))
    assert_same(runner, prompts, plain, got)
    assert drive.drafter.num_right > 4 * 12
    assert len(drive.plans) < len(before.plans) / 3


@pytest.mark.parametrize("wrong", [frozenset(range(0, 26, 3)), frozenset(range(6))])
def test_rejected_drafts_leave_nothing_behind(
    runner: CudaRunner, plain: list[list[int]], wrong: frozenset[int]
) -> None:
    """Neither for the many tokens that follow, nor for a request that finds them cached."""
    drafter = told(PROMPTS, plain, wrong=wrong)
    drive = Drive(runner, drafter)
    got = drive.run(requests_of(PROMPTS, 26))
    assert_same(runner, PROMPTS, plain, got)
    assert 0 < drafter.num_right < drafter.num_drafted
    again = [prompt + output for prompt, output in zip(PROMPTS, got, strict=True)]
    fresh = Drive(runner, None).run(requests_of(again, 2))
    drive.drafter = drive.loop.scheduler.drafter = None
    num_plans = len(drive.plans)
    cached = drive.run(requests_of(again, 2))
    assert sum(work.num_tokens for work in drive.plans[num_plans].work) < 20  # most was cached
    assert_same(runner, again, fresh, cached)


def test_drafts_beside_rows_without_and_a_long_prompt(runner: CudaRunner) -> None:
    """Two draft, one does not, and the fourth computes its prompt in pieces."""
    prompts = [[11, 12, 13], [21, 22], [31, 32, 33, 34], LONG_PROMPT]
    plain = Drive(runner, None).run(requests_of(prompts, 10))

    class Some(Told):
        def _guess(self, request, words, num_tokens):
            guess = super()._guess(request, words, num_tokens)
            return guess[:0] if words[0] == 31 else guess

    texts = [(len(p), p + o) for p, o in zip(prompts, plain, strict=True)]
    drive = Drive(runner, Some(CUDA_LIMITS, texts=texts, wrong=frozenset({5, 6})))
    got = drive.run(requests_of(prompts, 10))
    assert_same(runner, prompts, plain, got)
    kinds = [kind_of(plan.work) for plan in drive.plans]
    assert {(True, True, True), (True, True, False)} <= set(kinds)
    assert drive.drafter.num_right > 6


def kind_of(works: Sequence[Work]) -> tuple[bool, bool, bool]:
    """Whether a plan has drafts, rows alone, and pieces of a prompt."""
    drafts = any(work.num_draft for work in works)
    alone = any(work.num_tokens == 1 for work in works)
    return drafts, alone, any(work.num_tokens > 1 + work.num_draft for work in works)


def test_no_graph_needs_to_hold_a_step_with_drafts(
    runner: CudaRunner, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.mixed, "_graphs", [])
    drive = Drive(runner, told(PROMPTS, plain, wrong=frozenset({4})))
    got = drive.run(requests_of(PROMPTS, 12))
    assert_same(runner, PROMPTS, [output[:12] for output in plain], got)
    assert drive.drafter.num_right > 10


@pytest.mark.skipif(HAS_GPU, reason="tensor cores round other rows otherwise: near ties may differ")
def test_draws_are_those_of_their_positions(runner: CudaRunner, plain: list[list[int]]) -> None:
    options = {"temperature": 1.2, "seed": 7}
    drawn = Drive(runner, None).run(requests_of(PROMPTS, 20, **options))
    drafter = told(PROMPTS, drawn, wrong=frozenset(range(0, 20, 4)))
    assert Drive(runner, drafter).run(requests_of(PROMPTS, 20, **options)) == drawn
    assert drafter.num_right > 15
    assert drawn != [output[:20] for output in plain]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_grammars_rows_are_drafted_too(
    runner: CudaRunner, plain: list[list[int]], compiler: GrammarCompiler, temperature: float
) -> None:
    """What it forces, and guesses between; beside a request that the device draws."""
    outputs, steps = [], []
    for drafter in (None, told(PROMPTS, plain)):
        options = {"temperature": temperature, "seed": 5}
        requests = requests_of(PROMPTS[:1], 30, **options) + requests_of(PROMPTS[1:], 8)
        requests[0].constraint = compiler.compile(ORDER)
        drive = Drive(runner, drafter)
        outputs.append(drive.run(requests))
        assert requests[0].constraint.is_finished
        steps.append(len(drive.plans))
    assert len(outputs[0][0]) == len(outputs[1][0]) == 17
    if not HAS_GPU:  # there two letters may be near each other
        assert outputs[0][0] == outputs[1][0]
    assert_same(runner, PROMPTS[1:], outputs[0][1:], outputs[1][1:])
    assert steps[0] == 17
    assert steps[1] <= 17 - 8  # what is forced
    assert drafter.num_right >= 12


def test_text_without_matches_costs_nothing(runner: CudaRunner) -> None:
    """Every step runs ahead, and none is larger than without a drafter."""
    drive = Drive(runner, Drafter(CUDA_LIMITS))
    drive.run(requests_of(PROMPTS, 8, temperature=2.0, seed=1))
    assert drive.num_ahead == len(drive.plans) == 8
    assert all(work.num_tokens == 1 for plan in drive.plans[1:] for work in plan.work)
    assert drive.drafter.num_drafted == 0


def test_a_drafts_rows_are_all_outputs() -> None:
    requests = requests_of([[1, 2, 3], [4, 5], list(range(20))], 9, temperature=0.5, seed=3)
    for request in requests:
        request.num_computed = request.num_tokens - 1
    requests[0].tokens[3:5] = [7, 8]
    works = [
        Work(requests[1], 1, 1),
        Work(requests[0], 2, 3, 2),
        Work(requests[2], 4, 16),
    ]
    decode = DecodeWorks.of(works[:1], 16)
    check = mixed_work(works, decode, [5, 6, 7], most_checked_rows=64)
    beside = mixed_work(works, decode, [5, 6, 7], most_checked_rows=16)
    assert [len(work.decode[0]) for work in (check, beside)] == [0, 1]
    assert check.chunks == [(0, 1, 1, 5), (1, 2, 3, 6), (4, 4, 16, 7)]
    assert beside.chunks == [(0, 2, 3, 6), (3, 4, 16, 7)]
    assert check.prefill[0][:4].tolist() == [5, 3, 7, 8]
    for work in (check, beside):
        rows, slots, seeds, _ = work.outputs
        assert rows.tolist() == [0, 1, 2, 3, 19]
        assert slots.tolist() == [5, 6, 6, 6, 7]
        assert len(set(seeds.tolist())) == 5
    alone = [Work(requests[0], position, 1) for position in (2, 3, 4)]
    for ahead, work in enumerate(alone):
        requests[0].num_tokens = work.start + 1
        assert draws([work])[0][0] == check.outputs[2][1 + ahead]


def test_a_run_ends_with_the_first_token_that_is_not_the_drafts() -> None:
    request = make_request([1, 2, 3], 9)
    request.tokens[3:6] = [7, 8, 9]
    assert right_run([7, 8, 9, 4], request) == [7, 8, 9, 4]
    assert right_run([7, 5, 9, 4], request) == [7, 5]
    assert right_run([6, 8, 9, 4], request) == [6]
    assert right_run([6], request) == [6]


def test_long_contexts_have_graphs_of_their_own(
    runner: CudaRunner, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they differ from those of short ones; the tokens are the same."""
    asked = []
    get = type(runner.graphs).get

    def spy(graphs, num_rows, contexts):
        asked.append(contexts)
        return get(graphs, num_rows, contexts)

    monkeypatch.setattr(type(runner.graphs), "get", spy)
    tile_bytes = 128 * 2 * 16 * 2  # tokens, keys and values of one head, bfloat16
    monkeypatch.setattr("agentrt.cuda_runner.LONG_KV_BYTES", 2 * tile_bytes)
    prompts = [*PROMPTS, [6, 7, 8]]
    got = Drive(runner, None).run([*requests_of(PROMPTS, 3), *requests_of(prompts[2:], 6)])
    assert_same(runner, PROMPTS, [output[:3] for output in plain], got[:2])
    assert asked == ["long", "long", "short", "short", "short"]
    for bucket in (1, 2, 4):
        graphs = [runner.graphs.get(bucket, contexts) for contexts in ("short", "long")]
        assert (graphs[0] is not graphs[1]) == runner.graphs._differs_if_long(bucket)
