"""The Triton products and row kernels against float32, interpreted where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from gpu import DEVICE, interpreted, relative_error

from agentrt.kernels.gemv import ADD, GATE_UP, STORE, GemvTiles, gemv
from agentrt.kernels.rows import add_norm, embed, silu_mul
from agentrt.kernels.sample import num_chunks, sample_rows
from agentrt.kernels.skinny import MAX_ROWS, Normed, SkinnyTiles, SkinnyWork, num_tiles, skinny

pytestmark = interpreted
EPS = 1e-5
TOLERANCE = 6e-3  # bf16 rounds to 2^-9


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()


def on_its_way(x: torch.Tensor, weight: torch.Tensor) -> Normed:
    squares = unwritten(2, MAX_ROWS, dtype=torch.float32)
    halves = x.float().square().unflatten(1, (2, -1)).sum(-1)
    squares[:, : x.shape[0]] = halves.t()
    return Normed((x.float() * weight.float()).bfloat16(), squares, EPS)


@pytest.fixture
def work() -> SkinnyWork:
    partial = unwritten(1 << 18, dtype=torch.float32)
    return SkinnyWork(partial, torch.zeros(64, dtype=torch.int32, device=DEVICE))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


SHAPES = [(40, 64), (96, 576), (64, 1280), (200, 256)]  # outputs, inputs


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv(outputs: int, inputs: int, with_bias: bool) -> None:
    weight, x, norm = normal(outputs, inputs), normal(1, inputs), normal(inputs).abs()
    bias = normal(outputs) if with_bias else None
    expected = F.linear(normed(x, norm), weight.float(), None if bias is None else bias.float())
    for tiles in (None, GemvTiles(4, 64, 4)):
        out = gemv(weight, x, unwritten(1, outputs), norm=norm, bias=bias, eps=EPS, tiles=tiles)
        assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_gemv_adds_and_gates(outputs: int, inputs: int) -> None:
    weight, x, norm = normal(outputs, inputs), normal(1, inputs), normal(inputs).abs()
    hidden = normal(1, outputs, dtype=torch.float32)
    expected = hidden + F.linear(x.float(), weight.float())
    copy = unwritten(1, outputs)
    assert relative_error(gemv(weight, x, hidden, kind=ADD, copy=copy), expected) < 1e-5
    assert relative_error(copy, expected) < TOLERANCE
    both = normal(2 * outputs, inputs)
    gate, up = F.linear(normed(x, norm), both.float()).chunk(2, -1)
    out = gemv(both, x, unwritten(1, outputs), kind=GATE_UP, norm=norm, eps=EPS)
    assert relative_error(out, F.silu(gate) * up) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 9, 33])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_skinny(outputs: int, inputs: int, batch: int, work: SkinnyWork) -> None:
    weight, x, norm = normal(outputs, inputs), normal(batch, inputs), normal(inputs).abs()
    expected = F.linear(normed(x, norm), weight.float())
    out = skinny(weight, on_its_way(x, norm), unwritten(batch, outputs), work)
    assert relative_error(out, expected) < TOLERANCE
    both = normal(2 * outputs, inputs)
    gate, up = F.linear(normed(x, norm), both.float()).chunk(2, -1)
    out = skinny(both, on_its_way(x, norm), unwritten(batch, outputs), work, kind=GATE_UP)
    assert relative_error(out, F.silu(gate) * up) < TOLERANCE


@pytest.mark.parametrize("splits", [1, 4])
def test_skinny_adds_and_prepares_the_next_norm(splits: int, work: SkinnyWork) -> None:
    weight, x, norm = normal(200, 256), normal(5, 256), normal(200)
    hidden = normal(5, 200, dtype=torch.float32)
    expected = hidden + F.linear(x.float(), weight.float())
    following = Normed(
        unwritten(5, 200), unwritten(num_tiles(200, ADD), MAX_ROWS, dtype=torch.float32), EPS
    )
    tiles = SkinnyTiles(splits, 64, is_deep=False)
    skinny(weight, x, hidden, work, kind=ADD, following=(norm, following), tiles=tiles)
    assert relative_error(hidden, expected) < 1e-5
    assert relative_error(following.values, hidden * norm.float()) < TOLERANCE
    squares = hidden.square().sum(-1)
    torch.testing.assert_close(following.squares.sum(0)[:5], squares)
    assert not work.counters.any()


def test_skinny_bits_do_not_depend_on_the_batch(work: SkinnyWork) -> None:
    weight, x = normal(128, 512), normal(40, 512)
    tiles = SkinnyTiles(4, 64, is_deep=False)
    whole = skinny(weight, x, unwritten(40, 128), work, tiles=tiles)
    for rows in (slice(0, 1), slice(7, 12), slice(20, 40)):
        part = x[rows].contiguous()
        out = skinny(weight, part, unwritten(len(part), 128), work, tiles=tiles)
        assert torch.equal(out, whole[rows])


def test_fp8_weights_are_scaled_by_row(work: SkinnyWork) -> None:
    weight, x = normal(96, 256).float() * torch.rand(96, 1, device=DEVICE), normal(3, 256)
    scales = weight.abs().amax(1) / 448
    rounded = (weight / scales[:, None]).to(torch.float8_e4m3fn)
    expected = F.linear(x.float(), rounded.float() * scales[:, None])
    out = skinny(rounded, x, unwritten(3, 96), work, kind=STORE, scales=scales)
    assert relative_error(out, expected) < TOLERANCE
    one = gemv(rounded, x[:1], unwritten(1, 96), scales=scales)
    assert relative_error(one, expected[:1]) < TOLERANCE


def test_rows() -> None:
    table, norm = normal(50, 96), normal(96)
    last = torch.tensor([7, 8, 9], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([3, -1, 49], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([0, 2, 1], dtype=torch.int32, device=DEVICE)
    following = Normed(unwritten(3, 96), unwritten(1, MAX_ROWS, dtype=torch.float32), EPS)
    hidden = unwritten(3, 96, dtype=torch.float32)
    embed(ids, slots, last, table, hidden, (norm, following))
    assert torch.equal(hidden, table[[3, 9, 49]].float())
    torch.testing.assert_close(following.squares[0, :3], hidden.square().sum(-1))
    assert relative_error(add_norm(hidden, None, norm, EPS), normed(hidden, norm)) < TOLERANCE
    change = normal(3, 96)
    expected = hidden + change.float()
    assert relative_error(add_norm(hidden, change, norm, EPS), normed(expected, norm)) < TOLERANCE
    torch.testing.assert_close(hidden, expected)
    gate, up = change.float().chunk(2, -1)
    assert relative_error(silu_mul(change), F.silu(gate) * up) < TOLERANCE


def draw(logits: torch.Tensor, temperature: float, seeds: list[int]) -> list[int]:
    rows, vocab = logits.shape
    tokens, last = (torch.zeros(rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
    cells = num_chunks(vocab) * rows
    scratch = (
        unwritten(cells, dtype=torch.float32),
        torch.zeros(cells, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows, dtype=torch.int32, device=DEVICE),
    )
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE).flip(0)
    given = torch.tensor(seeds, dtype=torch.int32, device=DEVICE)
    sample_rows(
        logits, torch.full((rows,), temperature, device=DEVICE), given, slots, last, tokens, scratch
    )
    assert torch.equal(last.flip(0), tokens)
    return tokens.tolist()


def test_greedy_sampling_takes_the_lowest_of_equals() -> None:
    logits = normal(3, 9000, dtype=torch.float32)
    logits[1, [5, 7000]] = 9.0
    assert draw(logits, 0.0, [0, 0, 0]) == [int(logits[0].argmax()), 5, int(logits[2].argmax())]


def test_draws_follow_the_distribution_and_their_seed_alone() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]], device=DEVICE).repeat(400, 1)
    seeds = list(range(1, 401))
    tokens = draw(logits, 1.0, seeds)
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 400
    expected = torch.softmax(logits[0], -1).cpu()
    assert shares[3] == 0
    assert (shares - expected).abs().max() < 0.08
    assert draw(logits[:3], 1.0, seeds[5:8]) == tokens[5:8]
