"""Keys and values as 8-bit floats (e4m3): each kv head of a layer has a scale for its keys, and one
for its values, that do not change.

What is stored is a number divided by its scale, to the nearest, and cut off at the largest. A read
turns it into float16, which holds every such number, in one instruction for two. The scales then
stay outside of the loop over a context: the keys' in the scores' own, the values' in the result.
They are powers of two: a factor that is one changes no digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentrt.kernels.dependent import INTERPRETED

KV_DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of KV_DTYPE
_LARGEST = tl.constexpr(LARGEST)
_LARGEST_HALF = tl.constexpr(65504.0)  # of float16


def power_scales(largest: Tensor) -> Tensor:
    """Powers of two, float32, that divide numbers up to `largest` into the range of KV_DTYPE."""
    _, exponents = torch.frexp(largest.float() / LARGEST)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest.float()), exponents), 1.0)


@triton.jit
def load_scales(scales, kv_head, KV_HEADS: tl.constexpr):
    """Of keys and of values, from [2, kv_heads] of a layer."""
    return tl.load(scales + kv_head), tl.load(scales + KV_HEADS + kv_head)


@triton.jit
def narrowed(numbers, scale):
    """The numbers as they are stored."""
    inverse = 0x7F000000 - scale.to(tl.int32, bitcast=True)  # of a power of two
    numbers = numbers.to(tl.float32) * inverse.to(tl.float32, bitcast=True)
    numbers = tl.minimum(tl.maximum(numbers, -_LARGEST), _LARGEST)
    if INTERPRETED:
        numbers = _in_three_bits(numbers)
    return numbers.to(tl.float8e4nv)


@triton.jit
def _in_three_bits(numbers):
    """To the nearest number of e4m3, ties to even: the interpreter's cast loses the carry where a
    number is rounded up to a power of two, and is right where nothing is to be rounded."""
    bits = numbers.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    step: tl.constexpr = 0.001953125  # between the smallest ones
    small = (numbers + 12582912.0 * step) - 12582912.0 * step
    return tl.where(tl.abs(numbers) < 8 * step, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def half_query(query):
    """Queries as what stored keys are multiplied by."""
    query = tl.minimum(tl.maximum(query.to(tl.float32), -_LARGEST_HALF), _LARGEST_HALF)
    return query.to(tl.float16)
