"""deterministic=True on the CUDA path, interpreted where there is no GPU: steps of a whole runner,
whose logits and tokens do not depend on what else a step holds, nor on how it came to be."""

from collections.abc import Iterator

import pytest
import torch
from fakes import make_request
from gpu import DEVICE, interpreted
from interpreted import Drive, open_runner, small_config

from agentrt import GenerateOptions
from agentrt.cuda_runner import CUDA_LIMITS, CudaRunner
from agentrt.kernels import Segment
from agentrt.models.llama import LlamaModel
from agentrt.request import Request
from agentrt.speculate import Drafter

pytestmark = [*interpreted, pytest.mark.usefixtures("sums_in_order"), pytest.mark.timeout(400)]

BLOCK_TOKENS = 16
TOKENS = 5  # of an output
CONTEXT = [(7 * i + i * i // 3) % 250 for i in range(90)]
PROMPTS = [[40, 41, 42] * 5, CONTEXT[:63], [90, 80, 70], CONTEXT[20:51]]  # 8 blocks of KV


@pytest.fixture
def runner(tmp_path_factory: pytest.TempPathFactory, sums_in_order: None) -> Iterator[CudaRunner]:
    config = small_config(num_blocks=8, max_batch=4)
    opened = open_runner(tmp_path_factory.mktemp("shape"), config, deterministic=True)
    yield opened
    opened.close()


def pool(model: LlamaModel, copies: int) -> torch.Tensor:
    spec = model.spec
    shape = (spec.num_layers, 2, 6 * copies, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
    return torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)


def forward(
    model: LlamaModel, kv: torch.Tensor, parts: list[tuple[int, int, int]]
) -> list[torch.Tensor]:
    """Logits of parts (copy of the context, first position, number of rows)."""
    segments, rows = [], 0
    for copy, start, number in parts:
        segments.append(Segment(rows, number, start, tuple(range(6 * copy, 6 * copy + 6))))
        rows += number
    positions = torch.cat([torch.arange(s, s + n) for _, s, n in parts]).to(DEVICE)
    tokens = torch.tensor(CONTEXT, device=DEVICE)[positions]
    everything = torch.arange(rows, device=DEVICE)
    with torch.inference_mode():
        logits = model.forward(tokens, positions, tuple(segments), kv, everything)
    return list(logits.split([number for _, _, number in parts]))


def test_logits_and_keys_depend_on_a_rows_own_tokens_alone(runner: CudaRunner) -> None:
    """In one chunk, in several, token by token, and beside other rows."""
    model = runner.model
    kv = pool(model, 1)
    whole = forward(model, kv, [(0, 0, 90)])[0]
    for chunks in ([66, 20, 1, 1, 1, 1], [1, 2, 17, 70]):
        again, parts, start = pool(model, 1), [], 0
        for number in chunks:
            parts += forward(model, again, [(0, start, number)])
            start += number
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(again, kv)
    many = kv.repeat(1, 1, 4, 1, 1, 1)
    beside = forward(model, many, [(3, 64, 1), (1, 17, 1), (0, 60, 30), (2, 5, 21)])
    for logits, (first, end) in zip(beside, ((64, 65), (17, 18), (60, 90), (5, 26)), strict=True):
        assert torch.equal(logits, whole[first:end])
    assert torch.equal(many, kv.repeat(1, 1, 4, 1, 1, 1))


def requests_of(prompts: list[list[int]], num_tokens: int) -> list[Request]:
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    return [make_request(prompt, num_tokens, options=options) for prompt in prompts]


def test_tokens_alone_are_those_among_others(runner: CudaRunner) -> None:
    """Decode graphs and mixed steps, cached prefixes, preemption, and drafts."""
    alone = [Drive(runner, None).run(requests_of([prompt], TOKENS))[0] for prompt in PROMPTS]
    together = Drive(runner, None)
    assert together.run(requests_of(PROMPTS, TOKENS)) == alone
    assert together.loop.scheduler.num_preempted > 0
    assert len({len(plan.work) for plan in together.plans}) > 1
    drafting = Drive(runner, Drafter(CUDA_LIMITS))
    assert drafting.run(requests_of(PROMPTS, TOKENS)) == alone
