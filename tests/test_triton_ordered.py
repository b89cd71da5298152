"""Sums of one order: right, and the same bits whoever adds them. Interpreted where there is no GPU.

The interpreter's products of tiles are then summed in the order of the tensor cores, which numpy's
own are not: what is tested is the order that the kernels make of them.
"""

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from gpu import DEVICE, interpreted, relative_error
from test_triton_attention import Case, make
from test_triton_products import normal, unwritten

from agentrt.kernels import Segment
from agentrt.kernels.attention_decode import DecodeRows
from agentrt.kernels.attention_prefill import PrefillTiles, plan_tiles
from agentrt.kernels.gemv import ADD, GATE_UP, STORE
from agentrt.kernels.ordered_attention import tile_of
from agentrt.kernels.ordered_decode import OrderedDecodeWork, ordered_decode
from agentrt.kernels.ordered_prefill import ordered_prefill, ordered_tiles
from agentrt.kernels.ordered_products import OrderedTiles, OrderedWork, ordered_product
from agentrt.kernels.reference import attend_segment
from agentrt.kernels.rotary import append_heads

pytestmark = [*interpreted, pytest.mark.usefixtures("sums_in_order"), pytest.mark.timeout(400)]
TOLERANCE = 6e-3  # bf16 rounds to 2^-9


@pytest.fixture(scope="module")
def work() -> OrderedWork:
    return OrderedWork.allocate(DEVICE)


def expected_product(
    weight: torch.Tensor, x: torch.Tensor, kind: int, before: torch.Tensor
) -> torch.Tensor:
    plain = F.linear(x.float(), weight.float())
    if kind == GATE_UP:
        gate, up = plain.chunk(2, -1)
        return F.silu(gate) * up
    return before + plain if kind == ADD else plain


@pytest.mark.parametrize("kind", [STORE, ADD, GATE_UP])
@pytest.mark.parametrize(("outputs", "inputs"), [(200, 160), (96, 2048)])
def test_a_row_is_multiplied_in_one_way(
    outputs: int, inputs: int, kind: int, work: OrderedWork
) -> None:
    """All kinds of tiles, chunks that programs share and chunks that they do not."""
    weight = normal(2 * outputs if kind == GATE_UP else outputs, inputs)
    x = normal(300, inputs)
    dtype = torch.float32 if kind == ADD else torch.bfloat16
    before = normal(300, outputs, dtype=dtype)
    whole = ordered_product(weight, x, before.clone(), work, kind=kind)
    expected = expected_product(weight, x, kind, before.float())
    assert relative_error(whole, expected) < (1e-5 if kind == ADD else TOLERANCE)
    seen = {OrderedTiles.choose(outputs, inputs, 300, kind)}
    for first, end in ((0, 1), (7, 12), (3, 43), (100, 180), (40, 170)):
        tiles = OrderedTiles.choose(outputs, inputs, end - first, kind)
        for is_shared in {tiles.is_shared, False}:
            seen.add(cut := evolve(tiles, is_shared=is_shared))
            out = before[first:end].clone()
            ordered_product(weight, x[first:end], out, work, kind=kind, tiles=cut)
            assert torch.equal(out, whole[first:end])
            assert not work.counters.any()
    assert {tiles.tokens for tiles in seen} == {16, 64, 128}
    assert {tiles.is_shared for tiles in seen} == ({False, True} if inputs == 2048 else {False})


def test_fp8_weights_and_a_bias(work: OrderedWork) -> None:
    weight, x, bias = normal(96, 256), normal(70, 256), normal(96)
    scales = torch.rand(96, device=DEVICE) + 0.5
    narrow = weight.to(torch.float8_e4m3fn)
    out = ordered_product(narrow, x, unwritten(70, 96), work, scales=scales, bias=bias)
    expected = F.linear(x.float(), narrow.float() * scales[:, None], bias.float())
    assert relative_error(out, expected) < TOLERANCE
    one = ordered_product(narrow, x[9:10], unwritten(1, 96), work, scales=scales, bias=bias)
    assert torch.equal(one, out[9:10])


def test_splits_follow_the_shape_of_the_weight_alone() -> None:
    for kind, outputs, inputs in ((STORE, 6144, 4096), (ADD, 4096, 14336), (GATE_UP, 8192, 2048)):
        choices = [OrderedTiles.choose(outputs, inputs, tokens, kind) for tokens in range(1, 3000)]
        assert len({tiles.splits for tiles in choices}) == 1
        assert all(inputs // t.splits % t.columns == 0 for t in choices)


def appended(case: Case, num_tokens: int, slot: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A context whose keys are in the pool: its rows' turned queries, and its blocks."""
    made = case.geometry
    width = (made.num_heads + 2 * made.num_kv_heads) * made.head_dim
    ids = case.place(slot, 0, num_tokens)
    qkv = torch.randn(num_tokens, width).to(DEVICE, torch.bfloat16)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.full_like(positions, slot)
    append_heads(qkv, case.kv, case.tables, slots, positions, made, case.norms, is_exact=True)
    return qkv, ids


def decode(
    case: Case, qkv: torch.Tensor, slot: int, positions: list[int], num_programs: int
) -> torch.Tensor:
    """Rows at some positions of one context. One more row, in the middle, is idle."""
    made = case.geometry
    middle = len(positions) // 2
    places = [*positions[:middle], 0, *positions[middle:]]
    starts = torch.tensor([i - (i > middle) for i in range(len(places) + 1)])
    heads = made.num_heads, made.num_kv_heads, made.head_dim
    work = OrderedDecodeWork.allocate(num_programs, len(places), 1024, *heads, DEVICE)
    work.partial.fill_(float("nan"))
    rows = DecodeRows(
        torch.full((len(places),), slot, dtype=torch.int32, device=DEVICE),
        torch.tensor(places, dtype=torch.int32, device=DEVICE),
        starts.to(DEVICE, torch.int32),
        case.tables,
    )
    out = qkv.new_full((len(places), made.num_heads * made.head_dim), float("nan"))
    ordered_decode(qkv[places], case.kv, out, rows, work)
    assert not work.counters.any()
    assert out[middle].isnan().all()
    return torch.cat([out[:middle], out[middle + 1 :]])


def prefill(
    case: Case, qkv: torch.Tensor, slot: int, first: int, end: int, rows: int = 64
) -> torch.Tensor:
    made = case.geometry
    group = made.num_heads // made.num_kv_heads
    tiles = plan_tiles([(0, first, end - first, slot)], group, rows)
    described = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    out = qkv.new_full((end - first, made.num_heads * made.head_dim), float("nan"))
    shape = PrefillTiles(rows, tile_of(made.head_dim), 2, rows // 16)
    part = qkv[first:end].contiguous()
    return ordered_prefill(part, case.kv, out, case.tables, described, shape)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "with_norm", "block_tokens"),
    [(6, 2, 32, True, 16), (4, 1, 128, False, 64)],
)
def test_attention_of_a_row_is_one_sum(
    heads: int, kv_heads: int, dim: int, with_norm: bool, block_tokens: int
) -> None:
    """Prefill with either tile and from any position, decoding by any number of programs."""
    case, num = make(heads, kv_heads, dim, with_norm, block_tokens), 600
    qkv, ids = appended(case, num, 2)
    query = qkv.view(num, -1, dim)[:, :heads]
    expected = attend_segment(query, case.kv, Segment(0, num, 0, ids)).flatten(1)
    whole = prefill(case, qkv, 2, 0, num)
    assert relative_error(whole, expected) < 1e-2
    assert torch.equal(prefill(case, qkv, 2, 500, num, rows=128), whole[500:])
    for first, end in ((0, 9), (250, 270), (511, 513)):
        assert torch.equal(prefill(case, qkv, 2, first, end), whole[first:end])
    positions = [0, 63, 64, 255, 256, 511, 512, 599]
    for num_programs in (1, 5, 16, 64):
        assert torch.equal(decode(case, qkv, 2, positions, num_programs), whole[positions])
    assert torch.equal(decode(case, qkv, 2, [599], 64), whole[599:])


def test_an_idle_decode_row_appends_nothing() -> None:
    case = make(4, 2, 32, False)
    for slot in (0, 1):
        case.place(slot, 4 * slot, 40)
    before, qkv = case.kv.clone(), normal(3, 8 * 32)
    slots, positions, starts = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in ([0, 1, 1], [3, 5, 30], [0, 1, 1])
    )
    append_heads(qkv, case.kv, case.tables, slots, positions, case.geometry, None, starts=starts)
    changed = (case.kv != before).any(-1).any(2).any(0).nonzero().tolist()
    assert changed == sorted([[case.order[0], 3], [case.order[4 + 1], 30 % 16]])


def test_the_keys_of_a_tile_follow_the_heads_alone() -> None:
    for dim in (16, 64, 128, 256):
        shapes = [ordered_tiles(dim, tokens, 8, 4) for tokens in (1, 16, 200, 2048, 8192)]
        assert {shape.keys for shape in shapes} == {tile_of(dim)}
