"""Compiles the persistent steps for sm_90 and prints them: run by test_triton_persistent and
test_triton_persistent_batch with the shapes' names as arguments, "batch" first for several rows."""

import json
import re
import sys

import attrs
import torch
import triton
from compile_kernels import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agentrt.kernels import Geometry
from agentrt.kernels.cuda_products import CudaLinear
from agentrt.kernels.persistent import COLUMNS, NUM_PHASES, persistent_kernel
from agentrt.kernels.persistent_batch import persistent_batch_kernel
from agentrt.kernels.persistent_batch_step import NUM_WARPS as BATCH_WARPS
from agentrt.kernels.persistent_batch_step import PROGRAMS_EACH, BatchGrid, batch_constants
from agentrt.kernels.persistent_step import (
    NUM_WARPS,
    PersistentGrid,
    PersistentInputs,
    PersistentWeights,
    constants_of,
)

MULTIPROCESSORS = 132
POINTERS = {
    "*bf16": "embedding final_norm head kv row qkv attended gated scaled",
    "*fp32": "head_scales cos sin hidden logits partial peaks best_values temperatures squares "
    "sums",
    "*i32": "ring step flat token_ids slots positions starts seeds place tables last_tokens outbox "
    "counters best_tokens sample_counters barrier failed arrivals",
    "*i64": "addresses",
    "fp32": "eps scale",
    "i32": "batch first_layer end_layer",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
PARTS = ("token_ids", "slots", "positions", "starts", "seeds", "temperatures", "place")
SHAPES = {  # layers, hidden, width, heads, kv heads, dim, head norms
    "1b": (16, 2048, 8192, 32, 8, 64, False),
    "8b": (32, 4096, 14336, 32, 8, 128, False),
    "qwen3": (28, 1024, 3072, 16, 8, 128, True),
}


def memory(shape):
    """Of a model of that shape and its runner: nothing but sizes."""
    layers, hidden, width, heads, kv_heads, dim, has_norms = SHAPES[shape]
    nothing = torch.empty(0, device="meta")

    def meta(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta")

    names = PersistentInputs.__attrs_attrs__
    given = {a.name: nothing for a in names} | {
        "ring": meta(3, 386),
        "flat": meta(386),
        "tables": meta(65, 642),
    }
    embedding = meta(128256, hidden)
    weights = PersistentWeights(
        embedding=embedding,
        addresses=meta(layers, len(COLUMNS)),
        final_norm=meta(hidden),
        head=CudaLinear(embedding, None),
        hidden_size=hidden,
        intermediate_size=width,
        qkv_bias=False,
        head_norms=has_norms,
    )
    geometry = Geometry(heads, kv_heads, dim, 1e-5, nothing, nothing, hidden)
    kv = meta(layers, 2, 1000, kv_heads, 64, dim)
    return weights, geometry, PersistentInputs(**given), kv


def one_row(shape):
    """The constants that a step of that shape would have on an H100."""
    grid = PersistentGrid.choose(torch.device("cpu"), SHAPES[shape][5])
    grid = attrs.evolve(grid, num_programs=MULTIPROCESSORS, prefetch_tiles=2)
    return constants_of(*memory(shape), grid)


def rows(shape):
    """The same of several rows."""
    return batch_constants(*memory(shape), BatchGrid(PROGRAMS_EACH * MULTIPROCESSORS))


def compiled(kernel, given, num_warps):
    given, names = {**given, "FIRST": 0, "END": NUM_PHASES}, kernel.arg_names
    aligned = [n for n in names if TYPES.get(n, "").startswith("*") and n not in PARTS]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in given else TYPES[name] for name in names},
        constexprs=given,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "launch_cooperative_grid": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cuts = ("_R", "_BK", "_ITEMS", "_SPLITS")
    return {
        **usage_of(made),
        "shared": made.metadata.shared,
        "tiles": {name: value for name, value in given.items() if name.endswith(cuts)},
        "ptx": made.asm["ptx"],
        "layouts": sorted(set(re.findall(r"#ttg.nvidia_mma<{[^}]*}>", made.asm["ttgir"]))),
    }


def main():
    found = {}
    for name in sys.argv[1:]:
        if name == "batch":
            continue
        if "batch" in sys.argv:
            found[name] = compiled(persistent_batch_kernel, rows(name), BATCH_WARPS)
        else:
            found[name] = compiled(persistent_kernel, one_row(name), NUM_WARPS)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
