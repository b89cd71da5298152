"""Decode rows whose contexts begin alike: found by their blocks, and computed together."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fakes import make_request
from gpu import interpreted
from interpreted import Drive, open_runner, small_config

from agentrt import GenerateOptions
from agentrt.cuda_runner import CudaRunner
from agentrt.decode_works import DecodeWorks, find_common
from agentrt.kernels.attention_decode import num_tiles
from agentrt.request import Request
from agentrt.scheduler import Work

pytestmark = interpreted

BLOCK_TOKENS, DIM, GROUP = 16, 16, 2  # tiles of 128 tokens; 8 rows are read for at once
START = list(range(100, 116))  # 256 tokens


def work(blocks: list[int], position: int | None = None) -> Work:
    """A row that stands in the last of its blocks."""
    request = SimpleNamespace(lease=SimpleNamespace(block_ids=blocks))
    return Work(request, (len(blocks) - 1) * BLOCK_TOKENS if position is None else position, 1)  # type: ignore[arg-type]


def found(works: list[Work]) -> DecodeWorks:
    return find_common(DecodeWorks.of(works, DIM), BLOCK_TOKENS, DIM, GROUP)


def test_the_largest_group_comes_first() -> None:
    agents = [work([*START, 10 * i, 10 * i + 1]) for i in range(1, 6)]
    others = [work(list(range(200, 220))), work(list(range(300, 320)))]
    common = found([others[0], *agents[:3], others[1], *agents[3:]])
    assert common.works == (*agents, *others)
    assert (common.num_common, common.common_tiles) == (5, 2)
    assert common.tiles.tolist() == [3] * 7
    assert common.starts.tolist() == [0, 1, 2, 3, 4, 5, 8, 11]


def test_a_row_has_a_tile_of_its_own() -> None:
    """Also where all that stands before its token is common."""
    agents = [work([*START, i]) for i in range(4)]
    assert found(agents).tiles.tolist() == [2] * 4
    assert found(agents).starts.tolist() == [0, 1, 2, 3, 4]
    positions = (0, 127, 128, 129, 1024)
    rows = DecodeWorks.of([work(START, position) for position in positions], 64)
    assert rows.tiles.tolist() == [num_tiles(position, 64) for position in positions]


def test_only_whole_tiles_before_every_row_are_common() -> None:
    assert found([work([*START[:15], i, 9]) for i in range(4)]).common_tiles == 1
    early = work(START, 250)  # it writes into the last block of what the others share
    assert found([early, *(work([*START, i]) for i in range(3))]).common_tiles == 1
    assert found([work([*START, i]) for i in range(4)]).common_tiles == 2


@pytest.mark.parametrize(
    "works",
    [
        [work([*START, i]) for i in range(1)],
        [work([i, *START]) for i in range(4)],
        [work([*START[:7], 10 * i, *range(9)]) for i in range(4)],
        [work([*START[:8], *range(1000 * i, 1000 * i + 150)]) for i in range(1, 5)],
    ],
    ids=["one row", "nothing", "less than a tile", "too little of all"],
)
def test_what_does_not_pay_is_left(works: list[Work]) -> None:
    assert found(works).works == tuple(works)
    assert found(works).num_common == 0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaRunner]:
    opened = open_runner(tmp_path_factory.mktemp("shape"), small_config(max_batch=8))
    yield opened
    opened.close()


def requests_of(num_tokens: int) -> list[Request]:
    system = [(5 * i + i * i // 3) % 250 for i in range(130)]
    prompts = [[*system, *range(10 * n, 10 * n + 3)] for n in range(5)]
    options = GenerateOptions(max_tokens=num_tokens, ignore_eos=True)
    return [make_request(prompt, num_tokens, options=options) for prompt in [*prompts, [7, 8, 9]]]


def test_rows_of_one_system_prompt_give_the_tokens_that_they_give_alone(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of decode rows, and beside the chunk of a prompt that comes later."""
    asked = []
    get, find = type(runner.graphs).get, find_common

    def spy(graphs, num_rows, contexts):
        asked.append(contexts)
        return get(graphs, num_rows, contexts)

    def count(*given):
        asked.append(find(*given).num_common)
        return find(*given)

    monkeypatch.setattr(type(runner.graphs), "get", spy)
    monkeypatch.setattr("agentrt.cuda_runner.find_common", count)
    outputs = []
    for long_bytes in (1 << 30, 0):
        monkeypatch.setattr("agentrt.cuda_runner.LONG_KV_BYTES", long_bytes)
        drive, requests = Drive(runner, None), requests_of(4)
        first = drive.run(requests_of(1)[:1])  # leaves the system prompt in the cache
        for request in requests[:-1]:
            drive.loop._accept(request)
        for _ in range(2):
            drive.loop._step()
        outputs.append([*first, *drive.run(requests[-1:]), *drive.run([])])
        outputs[-1] += [request.output.tolist() for request in requests[:-1]]
    assert outputs[0] == outputs[1]
    assert asked == [*["short"] * 4, 5, "common", 5, 5, "common", "long", "long"]
