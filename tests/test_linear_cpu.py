"""Torch's int8 products on the CPU: close to float64, and the same bits whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.kernels.dispatch import has_fast_int8
from agentrt.kernels.linear_cpu import LARGEST, Int8Linear, split_digits

needs_int8 = pytest.mark.skipif(not has_fast_int8(), reason="the CPU has neither VNNI nor AMX")


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(
        rows, 1, generator=generator
    )


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 90), columns=st.sampled_from([32, 576, 1536]), seed=st.integers(0, 1000))
def test_digits_give_the_activation_back(rows: int, columns: int, seed: int) -> None:
    x = random(rows, columns, seed)
    digits, peak = split_digits(x)
    low, high = digits.double().chunk(2)
    error = (256 * high + low) * (peak.double() / LARGEST) - x
    assert (error.abs() <= peak / LARGEST * 0.51).all()
    assert (high * 256 + low).abs().max() <= LARGEST


@needs_int8
def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 64)
    linear = Int8Linear.pack(random(8, 64, 0), None)
    assert torch.equal(linear(x), torch.zeros(2, 8))


@needs_int8
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (64, 128)])
def test_int8_is_close_and_batch_invariant(inputs: int, outputs: int) -> None:
    weight = random(outputs, inputs, 3)
    bias = random(1, outputs, 4)[0]
    linear = Int8Linear.pack(weight, bias)
    x = random(130, inputs, 5)
    whole = linear(x)
    exact = x.double() @ weight.double().t() + bias
    assert (whole - exact).norm() / exact.norm() < 0.01  # weights have 8 bits
    rounded = linear.weight.t().double() * (linear.scale.double() * LARGEST)[:, None]
    assert (whole - x.double() @ rounded.t() - bias).norm() / exact.norm() < 1e-4
    for size in (1, 2, 3, 7, 29, 64):
        parts = torch.cat([linear(part) for part in x.split(size)])
        assert torch.equal(parts, whole)
