"""A barrier of all programs of one launch, in two halves: work may lie between them.

The launch must be cooperative (`launch_cooperative_grid=True`): then all programs are on the device
at once, or the launch fails, and nobody waits for a program that has no room to start.

Everyone adds 1 to one counter but for program 0, which adds what makes the sum 2^31: the barrier is
complete when the top bit turns over. So the counter's other bits are zero between barriers, and it
neither overflows nor has to be cleared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentrt.kernels.dependent import INTERPRETED

# Of one launch in all: seconds, when a step takes milliseconds.
MOST_POLLS = 1 << 22


@triton.jit
def again(number):
    """The same number, as if it were a new one: what is made of it is not computed before the loop
    over the layers, and kept in registers through all phases. Attention had none left."""
    found = number
    if not INTERPRETED:
        found = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )
    return found


@triton.jit
def announce(barrier, program, PROGRAMS: tl.constexpr):
    """This program has done its share, and what it stored may be read behind the barrier. Returns
    what `await_all` has to know."""
    # Triton 3.6 puts no barrier before a scalar release: other warps' stores might follow it.
    tl.debug_barrier()
    share = tl.where(program == 0, 2147483647 - (PROGRAMS - 2), 1)
    return tl.atomic_add(barrier, share, sem="release", scope="gpu")


@triton.jit
def await_all(barrier, seen, polls, failed):
    """Wait until everyone has announced; `seen` is what `announce` returned, `polls` how often this
    launch may still look. When none is left `failed` is set, and nothing is waited for any more:
    what the launch computes is worthless then. Returns the polls that are left."""
    now = seen
    while ((now ^ seen) >= 0) & (polls > 0):
        now = tl.atomic_add(barrier, 0, sem="acquire", scope="gpu")
        polls -= 1
    if (now ^ seen) >= 0:
        tl.store(failed, 1)
    return polls
