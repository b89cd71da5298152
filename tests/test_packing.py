"""KV in int8 on disk: how far its numbers move, and that the tier keeps it like any other."""

import math

import numpy as np
import pytest
from disk_damage import FINGERPRINT
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.cache.disk import DiskTier
from agentrt.cache.packing import ITEM_BYTES, Int8Packing
from agentrt.cache.tier import Record
from agentrt.config import default_cache_dir
from agentrt.errors import ConfigError
from agentrt.registry import locate

ROW_ITEMS = 8
SMOLLM = str(locate("smollm2-135m", default_cache_dir()))
numbers = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
some_rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 20), st.just(ROW_ITEMS)), elements=numbers
)


def as_bytes(rows, dtype):
    if dtype == "float32":
        return np.frombuffer(rows.tobytes(), np.uint8).copy()
    return (rows.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1).copy()


def as_floats(raw, dtype):
    if dtype == "float32":
        return raw.view(np.float32).reshape(-1, ROW_ITEMS)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, ROW_ITEMS)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@given(some_rows, st.integers(0, 7))
def test_a_number_moves_by_half_a_step_at_most(dtype, rows, num_cut):
    packing, plain = Int8Packing(dtype, ROW_ITEMS), as_bytes(rows, dtype)
    cut = num_cut * len(plain) // 8 // 4 * 4
    packed = np.concatenate([x.reshape(-1).view(np.uint8) for x in packing.pack([plain])])
    assert len(packed) == packing.packed_bytes(len(plain))
    assert packing.plain_bytes(len(packed)) == len(plain)
    back = np.zeros_like(plain)
    packing.unpack(packed, [back[:cut], back[cut:]])
    before, after = as_floats(plain, dtype), as_floats(back, dtype)
    largest = np.abs(before).max(axis=1, keepdims=True).astype(np.float64)
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-22
    error = np.abs(before.astype(np.float64) - after)
    assert (error <= largest * (0.5 / 127 + rounding) * (1 + 1e-6) + 1e-37).all()


def test_what_is_packed_twice_does_not_move_again():
    packing = Int8Packing("float32", ROW_ITEMS)
    rows = np.random.default_rng(0).normal(size=(50, ROW_ITEMS)).astype(np.float32)
    once, twice = np.zeros_like(rows), np.zeros_like(rows)
    for source, target in ((rows, once), (once, twice)):
        packed = b"".join(part.tobytes() for part in packing.pack([source]))
        packing.unpack(packed, [target])
    np.testing.assert_allclose(once, twice, rtol=1e-6)


def test_the_tier_keeps_packed_records_over_a_restart(tmp_path):
    packing = Int8Packing("float32", ROW_ITEMS)
    rows = np.random.default_rng(1).normal(size=(64, ROW_ITEMS)).astype(np.float32)
    record = Record(
        key=b"k" * 16,
        parent=b"p" * 16,
        token_ids=np.arange(64, dtype=np.int32),
        start=0,
        num_bytes=rows.nbytes,
        last_used_s=0.0,
    )

    def opened():
        return DiskTier(
            tmp_path,
            quota_bytes=4 << 20,
            fingerprint=FINGERPRINT,
            clock=lambda: 0.0,
            packing=packing,
        )

    with opened() as tier:
        assert tier.put(record, [rows])
        tier.flush()
        assert tier.stats().payload_bytes == packing.packed_bytes(rows.nbytes) < rows.nbytes / 2
    with opened() as tier:
        (found,) = tier.scan()
        assert found.num_bytes == rows.nbytes
        into = np.zeros_like(rows)
        assert tier.read(found, [into])
        assert np.abs(into - rows).max() < 0.02
        assert list(tier.verify()) == [True]
        tier.check()


async def test_an_engine_goes_on_from_int8_on_disk(tmp_path):
    """SmolLM2's next token is hardly another, from KV that has lost its last bits."""
    text = "The capital of France is Paris. The capital of Italy is Rome. " * 8
    options = GenerateOptions(max_tokens=1, ignore_eos=True, top_logprobs=50)
    config = EngineConfig(cache_dir=tmp_path, disk_kv_bytes=256 << 20, disk_kv_dtype="int8")
    done = []
    for _ in range(2):
        async with Engine(SMOLLM, config) as engine:
            done.append(await engine.generate(text, options))
    cold, warm = (dict(each.logprobs[0].top) for each in done)
    assert sum(done[0].usage.cached_tokens.values()) == 0
    assert done[1].usage.cached_tokens["disk"] > 100
    assert cold != warm
    apart = sum(abs(math.exp(cold[token]) - math.exp(warm.get(token, -99.0))) for token in cold)
    assert apart < 0.2


async def test_it_does_not_go_with_promises_of_bits(tmp_path):
    config = EngineConfig(cache_dir=tmp_path, disk_kv_dtype="int8", deterministic=True)
    with pytest.raises(ConfigError, match="disk_kv_dtype"):
        async with Engine(SMOLLM, config):
            pass
