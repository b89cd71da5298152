"""Compiles the persistent step for sm_90 and prints it: run by test_triton_persistent."""

import json
import sys

import attrs
import torch
import triton
from compile_kernels import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agentrt.kernels import Geometry
from agentrt.kernels.cuda_products import CudaLinear
from agentrt.kernels.persistent import NUM_PHASES, persistent_kernel
from agentrt.kernels.persistent_step import (
    NUM_WARPS,
    PersistentGrid,
    PersistentInputs,
    PersistentWeights,
    constants_of,
)

POINTERS = {
    "*bf16": "embedding final_norm head kv row qkv attended gated",
    "*fp32": "head_scales cos sin hidden logits partial peaks best_values temperatures",
    "*i32": "ring step flat token_ids slots positions starts seeds place tables last_tokens outbox "
    "counters best_tokens sample_counters barrier failed",
    "*i64": "addresses",
    "fp32": "eps scale",
    "i32": "first_layer end_layer",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
PARTS = ("token_ids", "slots", "positions", "starts", "seeds", "temperatures", "place")
SHAPES = {  # layers, hidden, width, heads, kv heads, dim, head norms
    "1b": (16, 2048, 8192, 32, 8, 64, False),
    "8b": (32, 4096, 14336, 32, 8, 128, False),
    "qwen3": (28, 1024, 3072, 16, 8, 128, True),
}


def constants(shape, first=0, end=NUM_PHASES):
    """As a step of that shape would have them on an H100."""
    layers, hidden, width, heads, kv_heads, dim, has_norms = SHAPES[shape]
    grid = attrs.evolve(PersistentGrid.choose(torch.device("cpu"), dim), num_programs=132)
    grid = attrs.evolve(grid, prefetch_tiles=2)
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
        addresses=meta(layers, 13),
        final_norm=meta(hidden),
        head=CudaLinear(embedding, None),
        hidden_size=hidden,
        intermediate_size=width,
        qkv_bias=False,
        head_norms=has_norms,
    )
    geometry = Geometry(heads, kv_heads, dim, 1e-5, nothing, nothing, hidden)
    kv = meta(layers, 2, 1000, kv_heads, 64, dim)
    found = constants_of(weights, geometry, PersistentInputs(**given), kv, grid)
    return {**found, "FIRST": first, "END": end}


def persistent(shape):
    given, names = constants(shape), persistent_kernel.arg_names
    aligned = [n for n in names if TYPES.get(n, "").startswith("*") and n not in PARTS]
    source = ASTSource(
        fn=persistent_kernel,
        signature={name: "constexpr" if name in given else TYPES[name] for name in names},
        constexprs=given,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": NUM_WARPS, "launch_cooperative_grid": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        **usage_of(made),
        "shared": made.metadata.shared,
        "tiles": {n: v for n, v in given.items() if n.endswith(("_R", "_BK"))},
        "ptx": made.asm["ptx"],
    }


def main():
    sys.stdout.write(json.dumps({name: persistent(name) for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
