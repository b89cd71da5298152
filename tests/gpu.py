"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter.

`conftest` switches the interpreter on before any kernel is imported. What only a device can show
(graphs, races, bits of the tensor cores) is marked `gpu`, and skipped without one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")
# The interpreter computes with numpy, which warns where a GPU gives infinity (exp of 100), and it
# takes loop bounds from arrays of one number, which numpy will forbid.
interpreted = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole, in the Frobenius norm. NaN never passes a comparison with it."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def dot_in_order() -> Callable[..., Any]:
    """The interpreter's product of tiles, summed as the tensor cores do: one column after another.
    numpy's own picks an order by the shape."""
    from triton.runtime.interpreter import TensorHandle

    def create_dot(self: object, a: Any, b: Any, acc: Any, *_: object) -> Any:
        total = acc.data.copy()
        for k in range(a.data.shape[-1]):
            total += a.data[:, k, None] * b.data[None, k]
        return TensorHandle(total.astype(np.float32), acc.dtype.scalar)

    return create_dot
