"""Who may import whom (architecture, section 2), read from the source; and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agentrt
import agentrt.cache
import agentrt.kernels

# From the bottom up: a module imports from its own layer and those below.
LAYERS = [
    {"errors", "types"},
    {"config", "metrics"},
    {"kernels", "cache"},
    {
        *("docstring", "gguf_file", "gguf_model", "grammar", "grammar_calls", "grammar_masks"),
        *("grammar_ending", "grammar_patterns", "grammar_python", "grammar_schemas"),
        *("model_folder", "models", "parsers", "parsers_cursor", "parsers_families"),
        *(
            "parsers_python",
            "registry",
            "structured",
            "safetensors_file",
            "template",
            "tokenizer",
            "tool_arguments",
            "tool_prompt",
        ),
        "token_runs",
        *("tool_schema", "tools", "vocabulary", "vocabulary_fast", "vocabulary_sentencepiece"),
        "weights",
    },
    {"guards", "guards_classifier", "guards_patterns", "observer", "screen", "tool_runs"},
    {"order", "speculate"},
    {
        "deferred",
        "explain",
        "mover",
        "origins",
        "output",
        "pauses",
        "poster",
        "precedence",
        "request",
        "scheduler",
        "token_log",
    },
    {"submission"},
    {
        *("batch", "chat", "cuda_inputs", "cuda_runner", "decode_graph", "runner", "sampler"),
        "decode_persistent",
        *("mixed_graph", "decode_works", "step_device", "step_rows", "transfer", "transfer_cuda"),
    },
    {"loop"},
    {
        *("conversation", "engine", "engine_parts", "engine_tiers", "session", "session_store"),
        *("step_thread", "stream", "tool_prefill", "turn"),
    },
    {"trace_page", "trace_record", "trace_timeline", "workload_budget"},
    {"adapters"},
    {"__main__"},
]
# Also those that the command line is split into, if any.
TOP = len(LAYERS) - 1
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

MAY_IMPORT_TORCH = {"kernels", "models", "weights", "batch", "sampler", "runner"}
MAY_IMPORT_TORCH |= {"cuda_inputs", "cuda_runner", "decode_graph", "mixed_graph", "step_device"}
MAY_IMPORT_TORCH |= {"decode_persistent"}
MAY_IMPORT_TORCH |= {"transfer_cuda"}
NEVER_EACH_OTHER = [("kernels", "cache"), ("cache", "kernels")]
ROOTS = {
    "agentrt": Path(agentrt.__file__).parent,
    "agentrt.kernels": Path(agentrt.kernels.__file__).parent,
    "agentrt.cache": Path(agentrt.cache.__file__).parent,
}


def _sources():
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            if name != "agentrt":
                yield pytest.param(name, path, id=name)


SOURCES = list(_sources())


def imports(path):
    """Names of modules imported anywhere in a file, but for type checkers alone."""
    waiting, found = [ast.parse(path.read_text(encoding="utf-8"))], []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.append(node.module)
            if node.module == "agentrt":
                found += [f"agentrt.{alias.name}" for alias in node.names]
        waiting += ast.iter_child_nodes(node)
    return found


def part(module):
    """`agentrt.cache.tree` -> `cache`."""
    return module.split(".")[1]


def rank(name):
    return RANKS.get(name, TOP if name.startswith(("command", "cli", "workload")) else None)


@pytest.mark.parametrize(("name", "path"), SOURCES)
def test_imports_point_downwards(name, path):
    own = part(name)
    assert rank(own) is not None, f"say in LAYERS where {name} belongs"
    for imported in imports(path):
        if imported.startswith("agentrt.") and part(imported) in RANKS:
            other = part(imported)
            assert rank(other) <= rank(own), f"{name} imports {imported} from above"
            assert (own, other) not in NEVER_EACH_OTHER, f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), SOURCES)
def test_torch_stays_where_the_device_is(name, path):
    if part(name) not in MAY_IMPORT_TORCH:
        assert not [i for i in imports(path) if i.split(".")[0] == "torch"]


def test_threads_meet_asyncio_in_the_loop_alone():
    """Besides it, only code that opens an engine on its thread, and locks of pure values."""
    users = {
        name
        for name, path in (param.values for param in SOURCES)
        if {"threading", "queue", "concurrent.futures"} & set(imports(path))
    }
    assert "agentrt.loop" in users
    assert users <= {
        *("agentrt.loop", "agentrt.engine", "agentrt.engine_parts", "agentrt.step_thread"),
        *("agentrt.grammar", "agentrt.grammar_masks", "agentrt.poster"),
        *("agentrt.precedence", "agentrt.transfer", "agentrt.transfer_cuda"),
        *("agentrt.cache.disk", "agentrt.cache.disk_writer"),
    }


HEAVY = ["torch", "numpy", "tokenizers", "sentencepiece", "gguf", "llguidance", "jinja2", "lmdb"]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import agentrt", HEAVY),
        ("from agentrt import EngineConfig, GenerateOptions", [*HEAVY[:1], *HEAVY[2:]]),
        ("from agentrt import Engine, tool", ["torch", "gguf", "sentencepiece", "llguidance"]),
    ],
)
def test_an_import_loads_only_what_it_needs(statement, heavy):
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
