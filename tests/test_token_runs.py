"""Runs of tokens: none that is there is denied, and few that are not there are affirmed."""

import numpy as np
import pytest

from agentrt.token_runs import TokenRuns


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("piece", [1, 3, 700])
def test_a_text_that_grows(length: int, piece: int) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 150_000, 2100).astype(np.int32)
    runs = TokenRuns(length, len(text))
    for end in range(piece, len(text) + 1, piece):
        runs.add(text[max(end - piece - length + 1, 0) : end])
    assert all(runs.may_have(text[i : i + length]) for i in range(len(text) - length + 1))
    others = rng.integers(0, 150_000, (1000, length)).astype(np.int32)
    assert sum(map(runs.may_have, others)) < 80


def test_order_counts() -> None:
    runs = TokenRuns(2, 100)
    runs.add(np.array([7, 9], dtype=np.int32))
    assert runs.may_have(np.array([7, 9], dtype=np.int32))
    assert not runs.may_have(np.array([9, 7], dtype=np.int32))
