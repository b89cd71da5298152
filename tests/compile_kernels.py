"""Compiles the kernels for sm_90 and prints what came out, as JSON: run by test_compile_gate."""

import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agentrt.kernels.attention_common import common_attention_kernel
from agentrt.kernels.attention_decode import (
    choose_stages,
    decode_attention_kernel,
    members,
    tile_tokens,
)
from agentrt.kernels.attention_prefill import PrefillTiles, prefill_attention_kernel
from agentrt.kernels.gemv import ADD, GATE_UP, STORE, GemvTiles, gemv_kernel
from agentrt.kernels.ordered_attention import SPLIT, tile_of
from agentrt.kernels.ordered_decode import ROWS, ordered_decode_kernel
from agentrt.kernels.ordered_prefill import ordered_prefill_kernel, ordered_tiles
from agentrt.kernels.ordered_products import TOKEN_TILES, OrderedTiles, ordered_kernel
from agentrt.kernels.skinny import SkinnyTiles, num_tiles, skinny_kernel
from agentrt.kernels.widen import TILE_COLUMNS, TILE_VALUES, widen_kernel

DUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
POINTERS = {
    "*bf16": "weight bias norm x out copy next_norm next_scaled qkv key_cache value_cache "
    "query_norm key_norm prefix_out",
    "*fp32": "scales squares next_squares partial cos sin peaks prefix_lse",
    "*i32": "counters tables slots positions starts tiles common",
    "fp32": "eps scale",
    "i32": "batch capacity prefix num_rows_all num_tokens",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
PRODUCTS = (
    ("store", 6144, 4096, STORE),
    ("add", 4096, 14336, ADD),
    ("gate_up", 8192, 2048, GATE_UP),
)


def usage_of(made):
    """Registers, stack and local bytes of a thread of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [DUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return dict(zip(("registers", "stack", "local"), map(int, numbers), strict=True))


def compiled(kernel, constants, types=None, **options):
    names, kinds = kernel.arg_names, TYPES | (types or {})
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        **usage_of(made),
        "shared": made.metadata.shared,
        "ptx": made.asm["ptx"],
        "layouts": sorted(set(re.findall(r"#ttg.nvidia_mma<{[^}]*}>", made.asm["ttgir"]))),
    }


def products(name, rows, columns, kind):
    """One matrix for one row, and for each padded batch."""
    shared = {"N": rows, "K": columns, "KIND": kind, "NORM": kind != ADD}
    shared |= {"SCALED": False, "BIAS": False, "PDL": True}
    gemv = GemvTiles.choose(rows, columns, kind)
    constants = {**shared, "COPY": kind == ADD, "R": gemv.rows, "BK": gemv.columns}
    yield (
        f"gemv_{name}",
        compiled(gemv_kernel, constants, num_warps=gemv.num_warps, launch_pdl=True),
    )
    shared |= {"PARTS": 64, "NEXT": kind == ADD}
    for is_narrow in (False, True):
        choose = SkinnyTiles.choose_narrow if is_narrow else SkinnyTiles.choose
        skinny = choose(num_tiles(rows, kind), columns)
        shared |= {"SPLITS": skinny.splits, "BK": skinny.columns, "PREFETCH": skinny.prefetch}
        shared["SCALED"] = is_narrow
        types = {"weight": "*fp8e4nv"} if is_narrow else {}
        for batch in (16, 32, 64):
            constants = {**shared, "BP": batch, "STAGES": skinny.num_stages(batch)}
            made = compiled(skinny_kernel, constants, types, num_warps=4, launch_pdl=True)
            made["is_deep"] = skinny.is_deep
            yield f"skinny{'-fp8' if is_narrow else ''}_{name}_{batch}", made


def widening(rows, columns):
    """A weight of 8 bits, made as wide as cuBLAS takes it."""
    tile = {"BK": TILE_COLUMNS, "R": TILE_VALUES // TILE_COLUMNS}
    types = {"weight": "*fp8e4nv"}
    made = compiled(widen_kernel, {"N": rows, "K": columns, **tile}, types, num_warps=8)
    yield f"widen_{rows}x{columns}", made


def attention(dim, kind="", types=None):
    shared = {"HEADS": 32, "KV_HEADS": 8, "D": dim, "BLOCK_TOKENS": 64, "TABLE": 642, "GP": 4}
    constants = {**shared, "TILE": tile_tokens(dim), "BP": 64, "NORM": False, "PDL": True}
    for batch, is_long in ((1, False), (32, False), (32, True)):
        stages = choose_stages(dim, batch, is_long=is_long)
        constants |= {"THREADS": 128, "STAGES": stages}
        made = compiled(decode_attention_kernel, constants, types, num_warps=4, launch_pdl=True)
        yield f"decode{kind}_{dim}_{batch}" + ("_long" if is_long else ""), made
    if not kind:
        constants |= {"MEMBERS": members(4)}
        made = compiled(common_attention_kernel, constants, types, num_warps=4, launch_pdl=True)
        yield f"decode-common_{dim}", made
    for length in (200, 2048):
        shape = PrefillTiles.choose(dim, length, 8, 4)
        tile = {"M": shape.rows, "TILE": shape.keys, "STAGES": shape.num_stages, "PREFIX": False}
        tile["SPLITS"] = shape.splits
        made = compiled(prefill_attention_kernel, shared | tile, types, num_warps=shape.num_warps)
        yield f"prefill{kind}_{dim}_{length}", made


def ordered_products(name, rows, columns, kind):
    """One matrix for every kind of tile."""
    for tokens in (1, 32, 64, 128, 200, 2048):
        tiles = OrderedTiles.choose(rows, columns, tokens, kind)
        constants = {"N": rows, "K": columns, "KIND": kind, "SPLITS": tiles.splits}
        constants |= {"SHARED": tiles.is_shared, "R": tiles.rows, "BK": tiles.columns}
        constants |= {"BP": tiles.tokens, "GROUP": TOKEN_TILES, "STAGES": tiles.num_stages}
        constants |= {"SCALED": False, "BIAS": False, "PREFETCH": 256, "PDL": tiles.rows == 64}
        made = compiled(
            ordered_kernel,
            constants,
            {"out": "*fp32"} if kind == ADD else {},
            num_warps=tiles.num_warps,
            enable_fp_fusion=False,
            launch_pdl=tiles.rows == 64,
        )
        yield f"ordered_{name}_{tokens}", made


def ordered_attention(dim):
    shared = {"HEADS": 32, "KV_HEADS": 8, "D": dim, "BLOCK_TOKENS": 64, "TABLE": 642, "GP": 4}
    shared |= {"TILE": tile_of(dim), "SPLIT_TOKENS": SPLIT}
    constants = {**shared, "BP": 64, "STAGES": 2, "M": ROWS, "PDL": True}
    exact = {"enable_fp_fusion": False}
    made = compiled(ordered_decode_kernel, constants, num_warps=4, launch_pdl=True, **exact)
    yield f"ordered-decode_{dim}", made
    for length in (200, 2048):
        shape = ordered_tiles(dim, length, 8, 4)
        constants = {**shared, "M": shape.rows, "STAGES": shape.num_stages}
        made = compiled(ordered_prefill_kernel, constants, num_warps=shape.num_warps, **exact)
        yield f"ordered-prefill_{dim}_{length}", made


def main():
    found = {}
    for product in PRODUCTS:
        found |= products(*product)
        found |= ordered_products(*product)
    found |= widening(3072, 2048)
    found |= widening(576, 1536)
    for dim in (64, 128):
        found |= attention(dim)
        found |= attention(dim, "-fp8", {"key_cache": "*fp8e4nv", "value_cache": "*fp8e4nv"})
        found |= ordered_attention(dim)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
