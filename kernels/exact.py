"""Launches of kernels that round every operation where it is written.

By default the compiler may join a product and a sum, wherever it likes: two kernels that compute
the same would then give other bits. With this off, `tl.fma` alone joins them.
"""

from __future__ import annotations

from agentrt.kernels.gemv import launch_options


def exact_options(pdl: bool, is_exact: bool = True) -> dict[str, bool]:
    """Options of a launch, exact or not."""
    return launch_options(pdl) | ({"enable_fp_fusion": False} if is_exact else {})
