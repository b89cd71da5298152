"""Dependent launch: a kernel starts while the one before it still runs, and fetches its weights.

On Hopper a kernel launched with `launch_pdl=True` may start once every program of its predecessor
has called `start_next`; `wait_previous` then blocks until the predecessor has ended and its writes
are visible. All kernels of a step call `start_next` first of all, so the only data that may be read
before `wait_previous` is what no kernel of the step writes: weights, tables, and keys and values of
earlier steps. Nor its inputs, which its first kernel fetches: so the second (`embed`) does not call
`start_next`, and none that follows begins before those are there.

Measured on an H100 (a bare chain of products, 1B shape, batch 1): 0.957 ms a step with plain
launches, 0.930 with dependent ones, 0.862 with the first weight tile loaded before the wait. In
whole steps (32 layers, 8B shape) what follows counted too: `start_next` before the first load, as
what is between waits for loads, and loads of the residual before the sums are there: 4.98 to 4.87
without attention; attention in little shared memory (see `attention_decode`): 5.45 to 5.14 with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter runs on CPUs, for tests: it knows no inline assembly, and its bf16 products are
# wrong, so that operands are widened there. On a GPU a float32 product would be tf32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_previous(PDL: tl.constexpr):
    """Wait for the end of the kernel before; nothing that it wrote may be read earlier."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers, num_bytes, PDL: tl.constexpr):
    """Bring `num_bytes` (a multiple of 16) from each pointer into the L2 cache. Give as many
    pointers as the program has threads: fewer would be fetched by several threads each."""
    if PDL:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [pointers, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_where(pointers, num_bytes, wanted):
    """The same from the threads alone that want it, a pointer a thread. Such fetches are issued one
    thread after another: a few large ones take less time than one from every thread."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [pointers, num_bytes, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def arrive(counter, number):
    """Count this program at `counter`; whether it is the last of `number`, which has then all
    that the others stored before. The last one resets the counter, for the next launch."""
    return arrive_with(counter, 1, number)


@triton.jit
def arrive_with(counter, share, number):
    """The same for a program that has done `share` of `number` pieces."""
    # Triton 3.6 puts no barrier before a scalar release: other warps' stores might follow it.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, share, sem="acq_rel") == number - share
    if is_last:
        tl.store(counter, 0)
    return is_last
