"""A runner whose steps of few rows are one launch each (on a CPU: a launch a phase)."""

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch
from fakes import make_request
from gpu import interpreted
from interpreted import Drive, open_runner, small_config

from agentrt import GenerateOptions
from agentrt.config import EngineConfig
from agentrt.cuda_runner import CudaRunner
from agentrt.errors import ConfigError
from agentrt.kernels.dispatch import choose_compute
from agentrt.request import Request

pytestmark = [*interpreted, pytest.mark.timeout(300)]

PROMPTS = [[40, 41, 42, 43], [90, 80, 70]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaRunner]:
    config = attrs.evolve(small_config(max_batch=2), decode_launch="persistent")
    opened = open_runner(tmp_path_factory.mktemp("shape"), config)
    yield opened
    opened.close()


def requests_of(prompts: list[list[int]], num_tokens: int) -> list[Request]:
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    return [make_request(prompt, num_tokens, options=options) for prompt in prompts]


def test_tokens_are_those_of_the_graphs(runner: CudaRunner, tmp_path: Path) -> None:
    """Of a row alone, and of two beside each other."""
    graphs = open_runner(tmp_path, small_config(max_batch=2))
    assert set(runner.graphs.persistent) == {1, 2}
    assert not graphs.graphs.persistent
    before = int(runner.inputs.step)
    for prompts, num_tokens in ((PROMPTS[:1], 3), (PROMPTS, 2)):
        got, expected = (
            Drive(one, None).run(requests_of(prompts, num_tokens)) for one in (runner, graphs)
        )
        assert got == expected
    assert int(runner.inputs.step) == int(graphs.inputs.step) > before
    graphs.close()


@torch.inference_mode()
def test_a_barrier_that_did_not_hold_ends_the_engine(runner: CudaRunner) -> None:
    assert set(runner.graphs.persistent) == {1, 2}
    runner.graphs.check()
    failed = runner.graphs.persistent[1].memory.failed
    failed.fill_(1)
    with pytest.raises(RuntimeError, match="decode_launch='graph'"):
        Drive(runner, None).run(requests_of(PROMPTS[:1], 3))
    failed.zero_()


@pytest.mark.parametrize(
    ("device", "wrong"),
    [
        ("cpu", {}),
        ("cuda", {"dtype": "float32"}),
        ("cuda", {"weights": "fp8"}),
        ("cuda", {"deterministic": True}),
    ],
)
def test_it_is_refused_where_it_cannot_be_had(
    device: str, wrong: dict[str, object], tmp_path: Path
) -> None:
    given = {"dtype": "auto", "weights": "auto", "deterministic": False} | wrong
    with pytest.raises(ConfigError, match="decode_launch='persistent'"):
        choose_compute(
            device=device,
            is_quantised=False,
            cache_dir=tmp_path,
            decode_launch="persistent",
            **given,  # type: ignore[arg-type]
        )
    with pytest.raises(ConfigError, match="decode_launch"):
        EngineConfig(decode_launch="eager")  # type: ignore[arg-type]
