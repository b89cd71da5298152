"""The native kernels: right against the oracles, and the same bits whatever the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.config import default_cache_dir
from agentrt.kernels import Geometry, Segment, StepInputs, native_build
from agentrt.kernels.dispatch import load_native
from agentrt.kernels.kv_layout import GroupLayout
from agentrt.kernels.linear_cpu import Int8Linear, split_digits
from agentrt.kernels.native import LARGEST, WIDTH_UNIT, Native, NativeOps, NativeStep
from agentrt.kernels.native_build import NativeUnavailable
from agentrt.kernels.plain import PlainStep
from agentrt.kernels.reference import ReferenceOps

HEADS, KV_HEADS, CONTEXT = 6, 2, 1024
CPU = torch.device("cpu")
REFERENCE = ReferenceOps(CPU)


def load():
    try:
        return load_native(default_cache_dir())
    except NativeUnavailable as exc:
        return str(exc)


NATIVE = load()
pytestmark = pytest.mark.skipif(isinstance(NATIVE, str), reason=str(NATIVE))
OPS = {"float32": NativeOps(NATIVE, is_int8=False), "int8": NativeOps(NATIVE, is_int8=True)}
POOLS = [torch.float32]
if not isinstance(NATIVE, str) and NATIVE.has_bfloat16:
    POOLS.append(torch.bfloat16)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_pool(
    num_blocks: int, block_tokens: int, dim: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    shape = (2, 2, num_blocks, KV_HEADS, block_tokens, dim)
    return random(*shape, seed=num_blocks * block_tokens).to(dtype)


def plain(pool: torch.Tensor) -> torch.Tensor:
    """What the oracle would hold: token after token."""
    layout = GroupLayout(pool.element_size())
    out = torch.empty_like(pool)
    source, target = pool.view(torch.uint8).numpy(), out.view(torch.uint8).numpy()
    layers, _, _, heads, block_tokens, row_bytes = source.shape
    for block in range(source.shape[2]):
        for token in range(block_tokens):
            one = np.empty((layers, 2, heads, 1, row_bytes), np.uint8)  # no whole group: plain
            layout.to_chunk(source[:, :, block], token, one, 0, 1)
            target[:, :, block, :, token : token + 1] = one
    return out


def make_step(
    ops: NativeOps | ReferenceOps,
    segments: list[Segment],
    kv: torch.Tensor,
    hidden: int = 64,
    outputs: list[int] | None = None,
) -> NativeStep | PlainStep:
    dim = kv.shape[5]
    inverse = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(CONTEXT, dtype=torch.float32)[:, None] * inverse
    cos, sin = ops.pack_rotation(angles, angles)
    positions = [range(s.start_position, s.start_position + s.num_rows) for s in segments]
    flat = torch.tensor([position for some in positions for position in some])
    inputs = StepInputs(
        flat % 50,
        flat,
        tuple(segments),
        kv,
        torch.tensor([0] if outputs is None else outputs).long(),
    )
    geometry = Geometry(HEADS, KV_HEADS, dim, 1e-5, cos, sin, hidden)
    return ops.plan_step(inputs, geometry)


def segments_of(work: list[tuple[int, int, tuple[int, ...]]]) -> list[Segment]:
    """(start, rows, blocks) in order, as segments of one batch."""
    segments, row = [], 0
    for start, num_rows, blocks in work:
        segments.append(Segment(row, num_rows, start, blocks))
        row += num_rows
    return segments


def make_qkv(segments: list[Segment], seeds: list[int], dim: int) -> torch.Tensor:
    """Rows that depend on their request and position alone."""
    rows = [
        random((HEADS + 2 * KV_HEADS) * dim, seed=5000 * seed + segment.start_position + i)
        for segment, seed in zip(segments, seeds, strict=True)
        for i in range(segment.num_rows)
    ]
    return torch.stack(rows)


def opened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Rows that products read, as numbers."""
    if x.dtype == torch.float32:
        return x
    low, high = digits_of(x, width).double()
    peak = x[:, -WIDTH_UNIT : 4 - WIDTH_UNIT].contiguous().view(torch.float32)
    return ((256 * high + low) * peak.double() / LARGEST).float()


def digits_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """[2, rows, width]: the low digits of rows that int8 products read, and the high ones."""
    rows, padded = len(x), -(-width // WIDTH_UNIT) * WIDTH_UNIT
    sums = x[:, 4 - WIDTH_UNIT : 12 - WIDTH_UNIT].contiguous().view(torch.int32)
    digits = x[:, : 2 * padded].contiguous().view(rows, 2, padded)
    if not torch.equal(digits.sum(2, dtype=torch.int32), sums):
        # 16 bits of both instead, the middle two of four swapped
        whole = digits.view(torch.int16).view(rows, -1, 4)[:, :, [0, 2, 1, 3]].reshape(rows, -1)
        low = whole.to(torch.int8)
        digits = torch.stack([low, ((whole.int() - low) >> 8).to(torch.int8)], 1)
        assert torch.equal(digits.sum(2, dtype=torch.int32), sums)
    return digits[:, :, :width].transpose(0, 1)


# ---- products and rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.sampled_from([8, 20, 64, 576]),
    outputs=st.sampled_from([4, 31, 64, 200]),
    biased=st.booleans(),
    kind=st.sampled_from(sorted(OPS)),
)
def test_a_product_is_right_and_a_row_has_its_bits_alone(
    rows: int, inputs: int, outputs: int, biased: bool, kind: str
) -> None:
    weight, bias = random(outputs, inputs, seed=1), random(outputs, seed=2) if biased else None
    linear = OPS[kind].pack_linear(weight, bias)
    table, ones = random(50, inputs, seed=3), torch.ones(inputs)
    segments = segments_of([(0, 1, (0,))] * rows)
    kv = make_pool(1, 64, 16)
    step = make_step(OPS[kind], segments, kv, inputs)
    _, x = step.embed(table, ones)
    out = step.linear(x, linear)
    used = weight
    if kind == "int8":
        packed = Int8Linear.pack(weight, None)
        used = packed.weight.t() * (packed.scale * LARGEST)[:, None]
    exact = opened(x, inputs).double() @ used.double().t() + (0 if bias is None else bias)
    torch.testing.assert_close(out.double(), exact, atol=2e-5 * inputs**0.5, rtol=1e-5)
    for row in range(rows):
        assert torch.equal(step.linear(x[row : row + 1], linear)[0], out[row])


def test_int8_products_have_the_bits_of_torchs() -> None:
    """The same digits, exact sums and order of roundings: two devices, one result."""
    linear, plain = (
        pack(random(96, 576, seed=1), random(96, seed=2))
        for pack in (OPS["int8"].pack_linear, Int8Linear.pack)
    )
    table = random(50, 576, seed=3)
    step = make_step(OPS["int8"], segments_of([(0, 40, (0,))]), make_pool(1, 64, 16), 576)
    _, x = step.embed(table, torch.ones(576))
    digits, _ = split_digits(opened(x, 576))
    assert torch.equal(digits.view(2, 40, 576), digits_of(x, 576))
    expected = plain(opened(x, 576))
    torch.testing.assert_close(step.linear(x, linear), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whole", [LARGEST, 127 * 256 - 128, 128, -128, 0])
def test_extreme_int8_sums_are_exact(rows: int, sign: int, whole: int) -> None:
    """Weights of 127 or -127 and digits of 127 and -128, next to each other: nothing saturates."""
    inputs, outputs = 1536, 40
    weight = torch.full((outputs, inputs), 127.0 * sign)
    weight[::3, ::2] *= -1
    numbers = torch.full((inputs,), float(whole))
    numbers[1:-1:5] *= -1
    numbers[-1] = LARGEST  # the peak: numbers are then whole ones in its units
    segments = segments_of([(0, 1, (0,))] * rows)
    step = make_step(OPS["int8"], segments, make_pool(1, 64, 16), inputs)
    _, x = step.embed(numbers.expand(50, inputs).contiguous(), torch.ones(inputs))
    digits = digits_of(x, inputs).long()
    assert torch.equal(256 * digits[1] + digits[0], numbers.long().expand(rows, inputs))
    low, high = digits @ weight.long().t()
    peak = x[:, -WIDTH_UNIT : 4 - WIDTH_UNIT].contiguous().view(torch.float32)
    low, high = low & 255, high + (low >> 8)  # one sum is shared out in one way
    expected = (low.float() + high.float() * 256) * torch.tensor(1.0).div(LARGEST) * peak
    out = step.linear(x, OPS["int8"].pack_linear(weight, None))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("flag", ["-mno-avx2", "-mno-avx512f"])
@pytest.mark.parametrize("kind", OPS)
def test_bits_do_not_depend_on_the_width_of_vectors(
    kind: str, flag: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 16 lanes without AVX-512, slow as they are, and of 8 lanes where it is."""
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, flag))
    other = NativeOps(Native.load(tmp_path_factory.getbasetemp()), kind == "int8")
    width, segments = HEADS * 24, segments_of([(300, 1, (0, 1)), (20, 70, (2, 3))])
    table, norm = random(50, width, seed=1), random(width, seed=2)
    down, both = random(width, width, seed=3), random(2 * width + 8, width, seed=4)
    bias = random(width, seed=5)
    results = []
    for ops in (OPS[kind], other):
        pool = make_pool(4, 256, 24)
        step = make_step(ops, segments, pool, width)
        qkv, norms = make_qkv(segments, [7, 8], 24), (random(24, seed=8), random(24, seed=9))
        attended = step.attend(0, qkv, norms)
        hidden, x = step.embed(table, norm)
        normed = step.add_norm(hidden, attended, ops.pack_linear(down, bias), norm)
        gated = step.gate_up(x, ops.pack_linear(both, None))
        rows = opened(attended, width), opened(normed, width), opened(gated, width + 4)
        results.append((pool, hidden, *rows))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("width", [20, 64, 576])
def test_fused_methods_equal_the_plain_ones(kind: str, width: int) -> None:
    """embed, add_norm and gate_up against the reference, on the weights as they were rounded."""
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if kind == "int8" else {"atol": 2e-5, "rtol": 2e-5}
    segments = segments_of([(0, 9, (0,))])
    table, norm = random(50, width, seed=1), random(width, seed=2)
    down, up = random(width, width, seed=3), random(2 * width + 8, width, seed=4)
    if kind == "int8":
        down, up = (
            Int8Linear.pack(w, None).weight.t() * (w.abs().amax(1) / 127)[:, None]
            for w in (down, up)
        )
    results = []
    for ops in (OPS[kind], REFERENCE):
        step = make_step(ops, segments, make_pool(1, 64, 16), width, outputs=[2, 8])
        hidden, x = step.embed(table, norm)
        added = step.add_norm(hidden, x, ops.pack_linear(down, None), norm)
        gated = step.gate_up(added, ops.pack_linear(up, None))
        results.append([hidden, opened(added, width), opened(gated, width + 4)])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp_min(1)
        torch.testing.assert_close(got / scale, expected / scale, **tolerance)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("outputs", [[2, 8], [0], list(range(9)), []])
def test_only_the_output_rows_go_on_behind_the_last_attention(
    kind: str, outputs: list[int]
) -> None:
    segments = segments_of([(0, 9, (0,))])
    pools = [make_pool(1, 64, 16) for _ in range(2)]
    qkv, hidden = make_qkv(segments, [7], 16), random(9, 64, seed=1)
    every, some = (make_step(OPS[kind], segments, pool, outputs=outputs) for pool in pools)
    attended = every.attend(1, qkv.clone(), None)
    left = some.attend_outputs(1, qkv.clone(), None, hidden)
    assert torch.equal(pools[0], pools[1])
    if not outputs:
        assert left is None
        return
    assert left is not None
    step, rows, found = left
    width = HEADS * 16
    assert torch.equal(opened(found, width), opened(attended, width)[outputs])
    assert torch.equal(rows, hidden[outputs])
    down, norm = OPS[kind].pack_linear(random(64, width, seed=3), None), random(64, seed=2)
    expected = every.add_norm(hidden, attended, down, norm)
    normed = step.add_norm(rows, found, down, norm)
    assert torch.equal(opened(normed, 64), opened(expected, 64)[outputs])
    assert torch.equal(rows, hidden[outputs])


@pytest.mark.parametrize("kind", OPS)
def test_a_row_of_zeros_stays_zero(kind: str) -> None:
    step = make_step(OPS[kind], segments_of([(0, 2, (0,))]), make_pool(1, 64, 16))
    hidden, x = step.embed(torch.zeros(50, 64), torch.ones(64))
    out = step.linear(x, OPS[kind].pack_linear(random(8, 64, seed=0), None))
    assert torch.equal(out, torch.zeros(2, 8))
    assert torch.equal(hidden, torch.zeros(2, 64))


# ---- attention


@pytest.mark.parametrize("dtype", POOLS)
@pytest.mark.parametrize("dim", [16, 24, 64, 128])
@pytest.mark.parametrize("block_tokens", [16, 48, 256])
@pytest.mark.parametrize(
    ("start", "num_rows"), [(0, 1), (0, 37), (63, 2), (250, 16), (255, 1), (256, 300), (700, 1)]
)
def test_attention_equals_the_oracle(
    dtype: torch.dtype, dim: int, block_tokens: int, start: int, num_rows: int
) -> None:
    num_blocks = -(-(start + num_rows) // block_tokens)
    pools = [make_pool(num_blocks + 3, block_tokens, dim, dtype) for _ in range(2)]
    order = torch.randperm(num_blocks + 3, generator=torch.Generator().manual_seed(1))
    segments = segments_of([(start, num_rows, tuple(order.tolist()))])
    qkv = make_qkv(segments, [7], dim)
    norms = random(dim, seed=8), random(dim, seed=9)
    got = make_step(OPS["float32"], segments, pools[0]).attend(1, qkv.clone(), norms)
    expected_pool = plain(pools[1]).float()
    before = expected_pool.clone()
    expected = make_step(REFERENCE, segments, expected_pool).attend(1, qkv.clone(), norms)
    # Keys and values are rounded to 8 bits; so are queries and weights.
    tolerance = 5e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    got_pool = plain(pools[0]).float()
    torch.testing.assert_close(got_pool, expected_pool, atol=1e-6, rtol=2**-8)
    untouched = expected_pool == before
    assert torch.equal(got_pool[untouched], before[untouched])


def attend(
    segments: list[Segment], seeds: list[int], kv: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """(seed, position) -> the row's output."""
    qkv = make_qkv(segments, seeds, kv.shape[5])
    out = make_step(OPS["float32"], segments, kv).attend(0, qkv, None)
    names = [
        (seed, segment.start_position + i)
        for segment, seed in zip(segments, seeds, strict=True)
        for i in range(segment.num_rows)
    ]
    return dict(zip(names, out, strict=True))


@pytest.mark.parametrize("dtype", POOLS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_tokens=st.sampled_from([16, 64, 256]), threads=st.integers(1, 3))
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(
    dtype: torch.dtype, data: st.DataObject, block_tokens: int, threads: int
) -> None:
    """Any cut of a context into chunks, beside other requests: the bits of one whole prompt."""
    length = data.draw(st.integers(1, 700), label="length")
    whole_pool = make_pool(2, 1024, 32, dtype)
    whole = attend(segments_of([(0, length, (1,))]), [1], whole_pool)
    num_blocks = -(-length // block_tokens)
    blocks = tuple(reversed(range(num_blocks)))
    others = [tuple(range(num_blocks + n * 50, num_blocks + n * 50 + 50)) for n in range(2)]
    kv = make_pool(num_blocks + 100, block_tokens, 32, dtype)
    before, start = torch.get_num_threads(), 0
    torch.set_num_threads(threads)
    try:
        while start < length:
            num_rows = data.draw(st.sampled_from([1, 2, 3, 9, 16, 17, 64, 300]), label="rows")
            num_rows = min(num_rows, length - start)
            beside = [(data.draw(st.integers(0, 700)), 1, other) for other in others]
            work, seeds = [(start, num_rows, blocks), *beside], [1, 2, 3]
            if num_rows > 1:
                work, seeds = [*beside, work[0]], [2, 3, 1]
            rows = attend(segments_of(work), seeds, kv)
            for position in range(start, start + num_rows):
                assert torch.equal(rows[1, position], whole[1, position])
            start += num_rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", POOLS)
@pytest.mark.parametrize("block_tokens", [16, 64, 256])
def test_rows_that_share_blocks_have_the_bits_of_lone_ones(
    dtype: torch.dtype, block_tokens: int
) -> None:
    """System prompts of several lengths, in common to all, to some, or to none."""
    kv = make_pool(1024, block_tokens, 32, dtype)
    trunk = tuple(range(40))
    works = []
    for index, (position, shared) in enumerate(
        [(700, 640), (710, 640), (701, 512), (650, 256), (90, 0), (600, 512)]
    ):
        own = tuple(range(100 + 60 * index, 160 + 60 * index))
        works.append((position, 1, trunk[: shared // block_tokens] + own))
    seeds = list(range(1, len(works) + 1))
    together = attend(segments_of(works), seeds, kv.clone())
    for seed, work in zip(seeds, works, strict=True):
        alone = attend(segments_of([work]), [seed], kv.clone())
        for name, row in alone.items():
            assert torch.equal(row, together[name])


@pytest.mark.parametrize("dtype", POOLS)
@pytest.mark.parametrize("position", [70, 71])
def test_unwritten_slots_add_nothing(dtype: torch.dtype, position: int) -> None:
    pools = [make_pool(2, 64, 32, dtype) for _ in range(2)]
    raw = pools[1].view(torch.uint8).numpy()
    nan = np.full((2, 2, KV_HEADS, 1, raw.shape[-1]), 0xFF, np.uint8)
    for token in range(position % 64 + 1, 64):
        GroupLayout(pools[1].element_size()).to_block(nan, 0, raw[:, :, 1], token, 1)
    assert pools[1].isnan().any()
    rows = [attend(segments_of([(position, 1, (0, 1))]), [1], kv)[1, position] for kv in pools]
    assert torch.equal(*rows)


def test_blocks_are_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        make_step(OPS["float32"], segments_of([(0, 2, (0,))]), make_pool(2, 24, 32))


def test_short_segments_must_come_first() -> None:
    with pytest.raises(ValueError, match="first"):
        make_step(OPS["float32"], segments_of([(0, 20, (0,)), (5, 1, (1,))]), make_pool(2, 64, 32))


def test_one_pool_of_threads() -> None:
    """The kernels run in the OpenMP library that torch loaded."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not say what is loaded")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    # Other packages may bring a renamed one, which the kernels cannot be linked to.
    assert len([path for path in paths if Path(path).name.startswith("libgomp.so")]) == 1
