"""Matrix products on a CPU: int8 weights with exact integer sums, and float tiles of fixed shape.

`Int8Linear` stores weights as int8 with one scale a row and splits each activation into two int8
digits, so that both products are int8 x int8 -> int32 and exact: a row's result has the same bits
whatever rows are beside it, and activations keep 15 bits. On a CPU with VNNI but no bf16 units
(2 cores) all layer matrices of SmolLM2-135M took 5.5 ms at batch 1 and 0.76 s for 2,048 tokens;
float32 took 28 ms and 1.73 s; `_weight_int4pack_mm_for_cpu` 4.5 ms and 3.3 s. One activation digit
(8 bits) costs half at large batches but moved the model's output 10x as far (mean KL against
float32 0.031 instead of 0.003).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

DIGIT = 256  # the high digit's weight
LARGEST = 127 * DIGIT  # of an activation, in units of its row's peak
TINY = 1e-30  # keeps the scale of an all-zero row finite
GRAIN_SIZE = 32768  # elements from which torch uses threads
_LARGEST = torch.tensor(float(LARGEST))


def split_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] -> (digits int8 [2 * rows, in], low ones first; peak [rows, 1]).

    `x ~ peak / LARGEST * (256 * high + low)`, within peak / LARGEST / 2.
    """
    if x.numel() < GRAIN_SIZE:
        few, few_peaks = _split_few(x.numpy())
        return torch.from_numpy(few), torch.from_numpy(few_peaks)
    peak = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
    whole = (x * torch.div(_LARGEST, peak)).round_().to(torch.int16)
    digits = torch.empty(2 * x.shape[0], x.shape[1], dtype=torch.int8)
    low, high = digits.chunk(2)
    low.copy_(whole)  # the low byte, read as signed: the high digit makes up for that
    high.copy_(whole.add_(DIGIT // 2).bitwise_right_shift_(8))
    return digits, peak


def _split_few(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The same arithmetic with numpy, whose calls cost less where torch would use one thread
    anyway (one row of 576: 10 us instead of 27)."""
    peak = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(TINY))
    scaled = x * (np.float32(LARGEST) / peak)
    whole = np.rint(scaled, out=scaled).astype(np.int16)
    digits = np.empty((2, *x.shape), dtype=np.int8)
    digits[0] = whole
    whole += DIGIT // 2
    whole >>= 8
    digits[1] = whole
    return digits.reshape(-1, x.shape[1]), peak


@frozen
class Int8Linear:
    """y = x W^T with W rounded to int8 per output row (symmetric)."""

    weight: Tensor  # int8 [in, out], a transposed view
    scale: Tensor  # [out], of a product of weight and activation units
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """weight [out, in] of any float type."""
        wide = weight.float()
        scale = wide.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
        whole = (wide / scale).round_().to(torch.int8)
        scale = scale[:, 0] / LARGEST
        return cls(whole.t(), scale, None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        digits, peak = split_digits(x)
        low, high = torch._int_mm(digits, self.weight).float().chunk(2)
        out = low.add_(high, alpha=DIGIT).mul_(self.scale).mul_(peak)
        return out if self.bias is None else out.add_(self.bias)


@frozen
class TiledLinear:
    """A float product in tiles of a fixed number of rows, so that a row's bits never depend on
    how many rows there are: sgemm picks its order of summation by shape."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    TILE_ROWS = 32

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % self.TILE_ROWS))
        tiles = torch.split(padded, self.TILE_ROWS)
        return torch.cat([F.linear(t, self.weight, self.bias) for t in tiles])[:rows]
