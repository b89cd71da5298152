"""Torch's attention over KV blocks, against the oracle."""

import pytest
import torch

from agentrt.kernels import Segment, attention_cpu
from agentrt.kernels.reference import attend_segment

HEADS, KV_HEADS, DIM = 6, 2, 32


def make_pool(num_blocks: int, block_tokens: int, layers: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_blocks * block_tokens)
    shape = (layers, 2, num_blocks, KV_HEADS, block_tokens, DIM)
    return torch.randn(shape, generator=generator)


def make_query(position: int, seed: int) -> torch.Tensor:
    """A query that depends on its request and position alone."""
    generator = torch.Generator().manual_seed(1000 * seed + position)
    return torch.randn(HEADS, DIM, generator=generator)


def run(
    segments: list[Segment], seeds: list[int], kv: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """(seed, position) -> the row's output."""
    queries, names = [], []
    for segment, seed in zip(segments, seeds, strict=True):
        for position in range(segment.start_position, segment.start_position + segment.num_rows):
            queries.append(make_query(position, seed))
            names.append((seed, position))
    with torch.inference_mode():
        plan = attention_cpu.plan_attention(tuple(segments), kv)
        out = plan.attend(0, torch.stack(queries))
    return dict(zip(names, out, strict=True))


def segments_of(work: list[tuple[int, int, tuple[int, ...]]]) -> list[Segment]:
    """(start, rows, blocks) in order, as segments of one batch."""
    segments, row = [], 0
    for start, num_rows, blocks in work:
        segments.append(Segment(row, num_rows, start, blocks))
        row += num_rows
    return segments


@pytest.mark.parametrize("block_tokens", [4, 16, 64, 256])
@pytest.mark.parametrize(
    ("start", "num_rows"), [(0, 1), (0, 37), (5, 1), (63, 2), (100, 29), (255, 1), (256, 3)]
)
def test_equals_the_oracle(block_tokens: int, start: int, num_rows: int) -> None:
    num_blocks = -(-(start + num_rows) // block_tokens)
    kv = make_pool(num_blocks + 3, block_tokens)
    blocks = tuple(
        torch.randperm(num_blocks + 3, generator=torch.Generator().manual_seed(1)).tolist()
    )
    (segment,) = segments_of([(start, num_rows, blocks)])
    got = torch.stack(list(run([segment], [7], kv).values()))
    query = torch.stack([make_query(start + i, 7) for i in range(num_rows)])
    torch.testing.assert_close(got, attend_segment(query, kv[0], segment), atol=2e-6, rtol=1e-5)


def test_unwritten_slots_add_nothing() -> None:
    kv = make_pool(2, 64)
    (segment,) = segments_of([(70, 1, (0, 1))])
    before = run([segment], [1], kv)
    kv[:, :, 1, :, 7:] = 1e4
    after = run([segment], [1], kv)
    assert torch.equal(before[1, 70], after[1, 70])


def test_append_kv_writes_the_rows_own_places() -> None:
    kv = make_pool(4, 4, layers=2)
    before = kv.clone()
    segments = segments_of([(5, 1, (3, 2)), (2, 4, (1, 0))])
    new = torch.arange(5 * 2 * KV_HEADS * DIM, dtype=torch.float32).view(5, 2, KV_HEADS, DIM)
    plan = attention_cpu.plan_attention(tuple(segments), kv)
    plan.append_kv(1, new)
    for row, (block, offset) in enumerate([(2, 1), (1, 2), (1, 3), (0, 0), (0, 1)]):
        assert torch.equal(kv[1, :, block, :, offset], new[row])
        before[1, :, block, :, offset] = new[row]
    assert torch.equal(kv, before)
