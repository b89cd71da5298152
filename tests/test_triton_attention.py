"""The Triton attention kernels against the reference, interpreted where there is no GPU."""

import pytest
import torch
import triton
from attrs import evolve, frozen
from gpu import DEVICE, interpreted, relative_error

from agentrt.kernels import Geometry, Segment
from agentrt.kernels.attention_decode import (
    DecodeRows,
    DecodeWork,
    choose_stages,
    decode_attention,
    num_tiles,
    tile_tokens,
)
from agentrt.kernels.attention_prefill import (
    PrefillTiles,
    plan_tiles,
    prefill_attention,
)
from agentrt.kernels.attention_prefix import attend_prefix, lengths_to_plan, prefix_tokens
from agentrt.kernels.narrow import KV_DTYPE, LARGEST, power_scales
from agentrt.kernels.reference import attend_segment
from agentrt.kernels.rotary import append_heads

EPS = 1e-5
CONTEXT = 1024
NUM_BLOCKS = 220
TOLERANCE = 1e-2  # bf16: the weights of softmax are rounded too
# Of 8-bit KV: they are float16, and only the result is bf16, which the interpreter cuts off.
NARROW_TOLERANCE = 4e-3
HEADS = [(6, 2, 16, False), (8, 2, 32, True), (4, 4, 16, False), (9, 3, 64, False)]
pytestmark = interpreted


@frozen
class Case:
    geometry: Geometry
    norms: tuple[torch.Tensor, torch.Tensor] | None
    kv: torch.Tensor
    tables: torch.Tensor
    order: list[int]  # block ids, shuffled
    scales: torch.Tensor | None = None  # [2, kv_heads], of a pool of 8 bits

    def place(self, slot: int, first: int, num_tokens: int) -> tuple[int, ...]:
        """Give a slot blocks for `num_tokens` tokens, those from the `first`-th on."""
        count = -(-num_tokens // self.kv.shape[3])
        ids = self.order[first : first + count]
        self.tables[slot, :count] = torch.tensor(ids, dtype=torch.int32)
        return tuple(ids)

    def heads(self, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """qkv normed and turned in float32, then rounded [rows, heads + 2 * kv_heads, dim]."""
        made, dim = self.geometry, self.geometry.head_dim
        both = made.num_heads + made.num_kv_heads
        heads = qkv.float().view(len(positions), -1, dim).clone()
        if self.norms is not None:
            for part, weight in zip(
                (heads[:, : made.num_heads], heads[:, made.num_heads : both]),
                self.norms,
                strict=True,
            ):
                part *= torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS) * weight.float()
        cos, sin = made.cos[positions][:, None], made.sin[positions][:, None]
        low, high = heads[:, :both].chunk(2, -1)
        heads[:, :both] = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        return heads.bfloat16()


def make(heads: int, kv_heads: int, dim: int, with_norm: bool, block_tokens: int = 16) -> Case:
    torch.manual_seed(0)
    frequencies = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = (torch.arange(CONTEXT)[:, None] * frequencies).to(DEVICE)
    geometry = Geometry(heads, kv_heads, dim, EPS, angles.cos(), angles.sin(), heads * dim)
    norms = None
    if with_norm:
        norms = tuple(torch.rand(2, dim).add(0.5).to(DEVICE, torch.bfloat16))
    kv = torch.randn(2, NUM_BLOCKS, kv_heads, block_tokens, dim).to(DEVICE, torch.bfloat16)
    tables = torch.zeros(8, CONTEXT // block_tokens, dtype=torch.int32, device=DEVICE)
    return Case(geometry, norms, kv, tables, torch.randperm(NUM_BLOCKS).tolist())


def narrowed(case: Case) -> Case:
    """With a pool of 8 bits, every head's scale another."""
    scales = power_scales(case.kv.float().abs().amax((1, 3, 4)))
    scales *= 2.0 ** (torch.arange(scales.numel(), device=DEVICE).view(scales.shape) % 3)
    return evolve(case, kv=as_stored(case.kv, scales[:, None, :, None, None]), scales=scales)


def as_stored(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (numbers.float() / scales).clamp(-LARGEST, LARGEST).to(KV_DTYPE)


def widened(case: Case) -> torch.Tensor:
    """The pool's numbers."""
    assert case.scales is not None
    return case.kv.float() * case.scales[:, None, :, None, None]


def assert_appended(case: Case, at: tuple[int, int], heads: torch.Tensor) -> None:
    """Key and value [2, kv_heads, dim] of one token are rounded as a cast rounds them."""
    assert case.scales is not None
    stored = case.kv[:, at[0], :, at[1]].float()
    expected = as_stored(heads, case.scales[..., None]).float()
    assert torch.equal(stored[1], expected[1])
    # Keys are turned, in float32, in another order of operations: a few are rounded the other way.
    torch.testing.assert_close(stored[0], expected[0], rtol=2**-3, atol=2**-9)
    assert (stored[0] != expected[0]).float().mean() < 0.05


def attend_decode(
    case: Case,
    qkv: torch.Tensor,
    slots: list[int],
    positions: list[int],
    num_programs: int = 7,
    *,
    is_long: bool = False,
    common: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Attention of rows, and their keys and values into case.kv; rows of a negative position are
    idle. `common`: see DecodeRows."""
    made, starts = case.geometry, [0]
    dim = made.head_dim
    for row, position in enumerate(positions):
        ahead = 0 if common is None or row >= common[0] else common[1]
        own = max(1, num_tiles(position, dim) - ahead) if position >= 0 else 0
        starts.append(starts[-1] + own)
    work = DecodeWork.allocate(num_programs, 8, made.num_heads, made.num_kv_heads, dim, DEVICE)
    rows = DecodeRows(
        *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (slots, positions, starts)),
        case.tables,
        None if common is None else torch.tensor(common, dtype=torch.int32, device=DEVICE),
    )
    out = qkv.new_full((len(slots), made.num_heads * made.head_dim), float("nan"))
    decode_attention(
        qkv,
        case.kv,
        out,
        rows,
        work,
        made.cos,
        made.sin,
        norms=case.norms,
        eps=EPS,
        num_stages=choose_stages(dim, len(slots), is_long=is_long),
        scales=case.scales,
    )
    assert not work.counters.any()
    return out


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "with_norm"), HEADS)
def test_decode(heads: int, kv_heads: int, dim: int, with_norm: bool, block_tokens: int) -> None:
    case = make(heads, kv_heads, dim, with_norm, block_tokens)
    slots, positions = [3, 1, 0, 5, 2], [0, 700, 255, 256, 33]
    qkv = torch.randn(5, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    made, kv, first = case.heads(qkv, torch.tensor(positions)), case.kv.clone(), 0
    expected = []
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        ids = case.place(slot, first, position + 1)
        first += len(ids)
        own = made[row, heads:].view(2, kv_heads, dim)
        kv[:, ids[position // block_tokens], :, position % block_tokens] = own
        query = made[row : row + 1, :heads]
        expected.append(attend_segment(query, kv, Segment(0, 1, position, ids)).flatten(1))
    out = attend_decode(case, qkv, slots, positions)
    assert relative_error(out, torch.cat(expected)) < TOLERANCE
    torch.testing.assert_close(case.kv, kv, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("num_programs", [1, 2, 3, 5, 16, 64])
def test_decode_is_shared_out_among_any_number_of_programs(num_programs: int) -> None:
    """Rows of many tiles and of one, and more programs than tiles."""
    case = make(8, 2, 32, True)
    slots, positions, first = [0, 1, 2, 3], [900, 40, 127, 128], 0
    for slot, position in zip(slots, positions, strict=True):
        first += len(case.place(slot, first, position + 1))
    qkv = torch.randn(4, 12 * 32).to(DEVICE, torch.bfloat16)
    alone = [attend_decode(case, qkv[i : i + 1], [slots[i]], [positions[i]], 1) for i in range(4)]
    whole = attend_decode(case, qkv, slots, positions, num_programs)
    assert relative_error(whole, torch.cat(alone)) < 2e-3
    assert torch.equal(attend_decode(case, qkv, slots, positions, num_programs), whole)


@pytest.mark.parametrize("dim", [32, 128])
def test_a_deeper_pipeline_gives_the_same_bits(dim: int) -> None:
    """Rows of several tiles, of one, of one that is not full, and the first token of all."""
    case = make(8, 2, dim, True)
    slots, positions, first = [0, 1, 2, 3], [900, 128, 37, 0], 0
    for slot, position in zip(slots, positions, strict=True):
        first += len(case.place(slot, first, position + 1))
    qkv = torch.randn(4, 12 * dim).to(DEVICE, torch.bfloat16)
    assert choose_stages(dim, 4, is_long=True) == 1 < choose_stages(dim, 8, is_long=True)
    short = attend_decode(case, qkv, slots, positions)
    assert torch.equal(attend_decode(case, qkv, slots, positions, is_long=True), short)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_common", "num_programs"),
    [(8, 2, 5, 1), (8, 2, 5, 64), (8, 2, 0, 5), (2, 1, 3, 5), (3, 1, 4, 9)],
)
def test_what_rows_have_in_common_is_read_for_several_at_once(
    heads: int, kv_heads: int, num_common: int, num_programs: int
) -> None:
    """Rows of which the first begin with the same two tiles, another, and an idle one."""
    dim, block_tokens = 32, 16
    case = make(heads, kv_heads, dim, True, block_tokens)
    tiles, tile = 2, tile_tokens(dim)
    slots, positions = [0, 1, 2, 3, 4, 5], [300, 256, 390, 600, 257, 130]
    blocks, first = tiles * tile // block_tokens, 0
    for slot, position in zip(slots, positions, strict=True):
        first += len(case.place(slot, first, position + 1))
    case.tables[1:num_common, :blocks] = case.tables[0, :blocks]
    qkv = torch.randn(7, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    kv = case.kv.clone()
    expected = attend_decode(case, qkv[:6], slots, positions, 1)
    after = case.kv.clone()
    case.kv.copy_(kv)
    slots, positions = [*slots, 7], [*positions, -1]
    out = attend_decode(case, qkv, slots, positions, num_programs, common=(num_common, tiles))
    assert torch.equal(case.kv, after)
    assert relative_error(out[:6], expected) < 2e-3


def test_tiles_count_the_row_itself() -> None:
    assert [num_tiles(position, 64) for position in (0, 127, 128, 129, 1024)] == [1, 1, 1, 2, 8]
    assert [num_tiles(position, 128) for position in (0, 64, 65, 1024)] == [1, 1, 2, 16]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "with_norm"), HEADS)
def test_prefill(heads: int, kv_heads: int, dim: int, with_norm: bool) -> None:
    case = make(heads, kv_heads, dim, with_norm)
    chunks = [(0, 0, 30, 4), (30, 37, 41, 6)]  # first row, position, rows, slot
    qkv = torch.randn(71, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    positions = torch.cat([torch.arange(p, p + n) for _, p, n, _ in chunks])
    slots = torch.tensor([4] * 30 + [6] * 41, dtype=torch.int32, device=DEVICE)
    made, kv, expected, first = case.heads(qkv, positions), case.kv.clone(), [], 0
    for row, position, number, slot in chunks:
        ids = case.place(slot, first, position + number)
        first += len(ids)
        for i in range(number):
            own = made[row + i, heads:].view(2, kv_heads, dim)
            kv[:, ids[(position + i) // 16], :, (position + i) % 16] = own
        query = made[row : row + number, :heads]
        expected.append(attend_segment(query, kv, Segment(0, number, position, ids)).flatten(1))
    where = positions.to(DEVICE, torch.int32)
    append_heads(qkv, case.kv, case.tables, slots, where, case.geometry, case.norms)
    torch.testing.assert_close(case.kv, kv, rtol=2**-7, atol=2**-8)
    assert relative_error(qkv.view(71, -1, dim)[:, :heads], made[:, :heads]) < TOLERANCE
    shape = PrefillTiles(64, 32, 2, 4)
    tiles = plan_tiles(chunks, heads // kv_heads, shape.rows)
    described = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(len(tiles) * kv_heads, dtype=torch.int32, device=DEVICE)
    for shape in (PrefillTiles(64, 32, 2, 4), PrefillTiles(64, 32, 2, 4, splits=3)):
        out = qkv.new_full((71, heads * dim), float("nan"))
        prefill_attention(qkv, case.kv, out, case.tables, described, shape, None, counters)
        assert relative_error(out, torch.cat(expected)) < TOLERANCE
        assert not counters.any()


def test_few_lengths_of_a_prefix_are_planned() -> None:
    assert prefix_tokens(32, 128, 2048, 14400, 2048) == 14336
    assert prefix_tokens(32, 128, 1500, 14400, 2048) == 14336  # computed as one of 2,048 rows
    assert prefix_tokens(32, 128, 900, 14400, 2048) == 0
    assert prefix_tokens(32, 128, 2048, 2048, 2048) == 0  # too little work
    lengths = lengths_to_plan(32, 128, 2048, 40960)
    assert lengths == list(range(4096, 40960, 2048))


def test_tiles_cover_every_row_once() -> None:
    tiles = plan_tiles([(0, 100, 70, 1), (70, 0, 5, 2)], 3, 64)
    rows = sorted(row + i for row, _, number, _ in tiles for i in range(number))
    assert rows == list(range(75))
    assert max(number for _, _, number, _ in tiles) * triton.next_power_of_2(3) <= 64


def test_prefill_continues_from_a_prefix_that_is_done() -> None:
    """The first 64 tokens' attention by cuDNN (on a CPU: torch's flash kernel), then the rest."""
    case = make(8, 2, 32, False)
    heads, kv_heads, dim = 8, 2, 32
    ids = case.place(1, 0, 100)
    qkv = torch.randn(20, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    positions = torch.arange(80, 100, dtype=torch.int32, device=DEVICE)
    slots = torch.ones(20, dtype=torch.int32, device=DEVICE)
    packed = torch.zeros(kv_heads, 32, heads // kv_heads, dim).to(qkv)
    append_heads(qkv, case.kv, case.tables, slots, positions, case.geometry, None, packed=packed)
    query = qkv.view(20, -1, dim)[:, :heads]
    expected = attend_segment(query, case.kv, Segment(0, 20, 80, ids)).flatten(1)
    blocks = torch.tensor(ids[:4], dtype=torch.int32, device=DEVICE)
    assert torch.equal(packed[:, :20].transpose(0, 1).reshape(20, heads, dim), query)
    prefix = attend_prefix(packed, 20, case.kv, blocks)
    assert prefix.num_tokens == 64
    shape = PrefillTiles(64, 32, 2, 4)
    tiles = torch.tensor(plan_tiles([(0, 80, 20, 1)], 4, 64), dtype=torch.int32, device=DEVICE)
    out = qkv.new_full((20, heads * dim), float("nan"))
    prefill_attention(qkv, case.kv, out, case.tables, tiles, shape, prefix)
    assert relative_error(out, expected) < TOLERANCE


NARROW_HEADS = [(8, 2, 32, True), (9, 3, 64, False), (4, 2, 128, False)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "with_norm"), NARROW_HEADS)
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_decode_from_8_bits(
    heads: int, kv_heads: int, dim: int, with_norm: bool, block_tokens: int
) -> None:
    case = narrowed(make(heads, kv_heads, dim, with_norm, block_tokens))
    slots, positions = [3, 1, 0, 5, 2], [0, 700, 255, 256, 33]
    qkv = torch.randn(5, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    places, first = [], 0
    for slot, position in zip(slots, positions, strict=True):
        places.append(case.place(slot, first, position + 1))
        first += len(places[-1])
    out = attend_decode(case, qkv, slots, positions)
    made, kv, expected = case.heads(qkv, torch.tensor(positions)), widened(case), []
    for row, (position, ids) in enumerate(zip(positions, places, strict=True)):
        own = exact_heads(case, qkv[row], position)
        assert_appended(case, (ids[position // block_tokens], position % block_tokens), own)
        query = made[row : row + 1, :heads].float()
        expected.append(attend_segment(query, kv, Segment(0, 1, position, ids)).flatten(1))
    assert relative_error(out, torch.cat(expected)) < NARROW_TOLERANCE
    assert torch.equal(attend_decode(case, qkv, slots, positions, is_long=True), out)
    few = attend_decode(case, qkv[:4], slots[:4], positions[:4])
    assert relative_error(few, out[:4]) < 2e-3


def exact_heads(case: Case, row: torch.Tensor, position: int) -> torch.Tensor:
    """A row's key and value [2, kv_heads, dim], the key turned and not rounded."""
    made = case.geometry
    wide = row.float().view(1, -1, made.head_dim)
    key, value = wide[0, made.num_heads :].view(2, made.num_kv_heads, -1).clone()
    if case.norms is not None:
        key *= torch.rsqrt(key.square().mean(-1, keepdim=True) + EPS) * case.norms[1].float()
    low, high = key.chunk(2, -1)
    cos, sin = made.cos[position], made.sin[position]
    return torch.stack([torch.cat([low * cos - high * sin, high * cos + low * sin], -1), value])


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "with_norm"), NARROW_HEADS)
def test_prefill_from_8_bits(heads: int, kv_heads: int, dim: int, with_norm: bool) -> None:
    case = narrowed(make(heads, kv_heads, dim, with_norm))
    qkv = torch.randn(41, (heads + 2 * kv_heads) * dim).to(DEVICE, torch.bfloat16)
    raw, positions = qkv.clone(), torch.arange(37, 78)
    ids = case.place(6, 0, 78)
    slots = torch.full((41,), 6, dtype=torch.int32, device=DEVICE)
    where = positions.to(DEVICE, torch.int32)
    append_heads(
        qkv, case.kv, case.tables, slots, where, case.geometry, case.norms, scales=case.scales
    )
    for row, position in enumerate(positions.tolist()):
        own = exact_heads(case, raw[row], position)
        assert_appended(case, (ids[position // 16], position % 16), own)
    query = qkv.view(41, -1, dim)[:, :heads].float()
    expected = attend_segment(query, widened(case), Segment(0, 41, 37, ids)).flatten(1)
    group = heads // kv_heads
    tiles = torch.tensor(plan_tiles([(0, 37, 41, 6)], group, 64), dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(len(tiles) * kv_heads, dtype=torch.int32, device=DEVICE)
    for shape in (PrefillTiles(64, 32, 2, 4), PrefillTiles(64, 32, 2, 4, splits=3)):
        out = qkv.new_full((41, heads * dim), float("nan"))
        arguments = (case.tables, tiles, shape, None, counters, case.scales)
        prefill_attention(qkv, case.kv, out, *arguments)
        assert relative_error(out, expected) < NARROW_TOLERANCE
    packed = query.to(torch.bfloat16).view(41, kv_heads, group, dim).transpose(0, 1).contiguous()
    blocks = torch.tensor(ids[:2], dtype=torch.int32, device=DEVICE)
    prefix = attend_prefix(packed, 41, case.kv, blocks, case.scales)
    out = qkv.new_full((41, heads * dim), float("nan"))
    arguments = (case.tables, tiles, PrefillTiles(64, 32, 2, 4), prefix, None, case.scales)
    prefill_attention(qkv, case.kv, out, *arguments)
    assert relative_error(out, expected) < 2 * NARROW_TOLERANCE  # part of it was bf16 before


def test_what_is_too_large_for_8_bits_is_cut_off() -> None:
    """And what is too small is zero; neither is NaN."""
    case = narrowed(make(8, 2, 32, False))
    qkv = torch.zeros(1, 12 * 32).to(DEVICE, torch.bfloat16)
    qkv[0, -64:-32], qkv[0, -32:] = 1e6, -1e-9
    ids = case.place(0, 0, 1)
    out = attend_decode(case, qkv, [0], [0])
    stored, scales = case.kv[1, ids[0], :, 0].float(), case.scales
    assert scales is not None
    assert stored[0].tolist() == [LARGEST] * 32
    assert stored[1].tolist() == [0.0] * 32
    assert out[0, 0].float() == LARGEST * scales[1, 0]


def test_scales_are_powers_of_two_that_leave_room_for_the_largest() -> None:
    largest = torch.tensor([0.0, 1e-3, 100.0, 448.0, 449.0, 1e5])
    scales = power_scales(largest)
    assert scales[0] == 1
    assert torch.equal(torch.frexp(scales)[0], torch.full((6,), 0.5))
    assert (largest / scales <= LARGEST).all()
    assert (largest[1:] / scales[1:] >= LARGEST / 2).all()
