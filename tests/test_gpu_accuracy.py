"""Whole models of real sizes on a GPU: logits against transformers in float32, same weights."""

import json
import logging

import pytest
import torch
import transformers
from attrs import define, field
from gpu import DEVICE, needs_gpu, relative_error

from agentrt.kernels import Segment
from agentrt.kernels.attention_prefill import Prefix, plan_tiles, prefill_attention
from agentrt.kernels.attention_prefix import attend_prefix
from agentrt.kernels.cuda import CudaOps
from agentrt.kernels.reference import ReferenceOps
from agentrt.models.base import read_spec
from agentrt.models.llama import LlamaModel, expected_shapes

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.timeout(300)]

logger = logging.getLogger(__name__)  # --log-cli-level=INFO shows the errors
CONTEXT = 1024
BLOCK_TOKENS = 64
CONFIGS = {
    "llama": transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32000,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "qwen3": transformers.Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        tie_word_embeddings=True,
    ),
    "smollm2": transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=32000,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}


@define
class Case:
    """A model of transformers in float32, whose weights bf16 holds exactly, and its logits."""

    theirs: torch.nn.Module
    tokens: torch.Tensor
    expected: torch.Tensor = field(init=False)

    @expected.default
    def _logits(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.theirs(self.tokens[None]).logits[0].float()

    def least_error(self) -> float:
        """Of any computation whose products read bf16: float32, but for that rounding."""
        products = [one for one in self.theirs.modules() if isinstance(one, torch.nn.Linear)]
        hooks = [
            one.register_forward_pre_hook(lambda _, given: (given[0].bfloat16().float(),))
            for one in products
        ]
        rounded = self._logits()
        for hook in hooks:
            hook.remove()
        return relative_error(rounded, self.expected)

    def ours(self, dtype: torch.dtype, *, fp8: bool = False) -> LlamaModel:
        spec = read_spec(json.loads(self.theirs.config.to_json_string()))
        weights = dict(self.theirs.named_parameters())
        ops = ReferenceOps(DEVICE) if dtype == torch.float32 else CudaOps(DEVICE, fp8=fp8)
        tensors = ((name, weights[name].data.to(dtype)) for name in expected_shapes(spec))
        with torch.inference_mode():
            return LlamaModel.build(spec, ops, tensors, CONTEXT)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    assert torch.get_float32_matmul_precision() == "highest"  # no tf32
    with torch.device(DEVICE):
        theirs = transformers.AutoModelForCausalLM.from_config(
            CONFIGS[request.param], dtype=torch.float32
        )
    for weight in theirs.parameters():
        weight.data = weight.data.bfloat16().float()
    return Case(theirs.eval(), torch.randint(0, 32000, (600,), device=DEVICE))


def pool(model: LlamaModel, copies: int, dtype: torch.dtype) -> torch.Tensor:
    spec = model.spec
    blocks = copies * CONTEXT // BLOCK_TOKENS
    shape = (spec.num_layers, 2, blocks, spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def forward(
    model: LlamaModel, case: Case, kv: torch.Tensor, segments: list[tuple[int, int, int]]
) -> torch.Tensor:
    """Logits of all rows of segments (copy of the context, first position, number of rows)."""
    made, rows, each = [], 0, CONTEXT // BLOCK_TOKENS
    for copy, start, number in segments:
        made.append(Segment(rows, number, start, tuple(range(copy * each, copy * each + each))))
        rows += number
    positions = torch.cat([torch.arange(s, s + n) for _, s, n in segments]).to(DEVICE)
    with torch.inference_mode():
        return model.forward(
            case.tokens[positions], positions, tuple(made), kv, torch.arange(rows, device=DEVICE)
        )


def test_float32(case: Case) -> None:
    model = case.ours(torch.float32)
    kv = pool(model, 1, torch.float32)
    parts = [forward(model, case, kv, [(0, *part)]) for part in ((0, 512), (512, 87), (599, 1))]
    error = relative_error(torch.cat(parts), case.expected)
    logger.info("float32 relative error %.1e", error)
    assert error < 1e-3


def test_bfloat16(case: Case) -> None:
    """Prefill by cuBLAS and by skinny products, then decode: one row, and sixteen at once."""
    model = case.ours(torch.bfloat16)
    kv = pool(model, 16, torch.bfloat16)
    errors = {}
    for name, start, number in (("dense", 0, 512), ("skinny", 512, 60)):
        logits = forward(model, case, kv, [(0, start, number)])
        errors[name] = relative_error(logits, case.expected[start : start + number])
    ones = [forward(model, case, kv, [(0, 572 + i, 1)]) for i in range(12)]
    errors["one row"] = relative_error(torch.cat(ones), case.expected[572:584])
    each = CONTEXT // BLOCK_TOKENS
    for copy in range(1, 16):
        kv[:, :, copy * each : copy * each + each] = kv[:, :, :each]
    positions = [37 * i + 5 for i in range(16)]
    logits = forward(model, case, kv, [(copy, p, 1) for copy, p in enumerate(positions)])
    errors["batch"] = relative_error(logits, case.expected[positions])
    narrow = type(case.theirs)._from_config(case.theirs.config, dtype=torch.bfloat16).to(DEVICE)
    narrow.load_state_dict(case.theirs.state_dict())
    with torch.inference_mode():
        theirs = relative_error(narrow(case.tokens[None]).logits[0], case.expected)
    least = case.least_error()
    logger.info("bf16: relative errors %s; of transformers %.4f; least %.4f", errors, theirs, least)
    # A random net of 16 wide layers amplifies any rounding (least: 0.014): there transformers' own
    # is the measure.
    assert max(errors.values()) < max(1e-2, 0.85 * theirs)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 64), (32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_long_prefill_attention(heads: int, kv_heads: int, dim: int, with_prefix: bool) -> None:
    """600 rows after 6,656 tokens, wholly by the Triton kernel, or the whole blocks by cuDNN."""
    torch.manual_seed(1)
    rows, before, blocks = 600, 6656, 120
    kv = torch.randn(2, blocks, kv_heads, BLOCK_TOKENS, dim, device=DEVICE).bfloat16()
    order = torch.randperm(blocks, device=DEVICE)
    tables = order[None].int()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=DEVICE).bfloat16()
    query = qkv.view(rows, -1, dim)[:, :heads]
    keys, values = (c[order].transpose(0, 1).flatten(1, 2)[:, : before + rows].double() for c in kv)
    group = heads // kv_heads
    scores = (
        torch.einsum("rhd,htd->hrt", query.double(), keys.repeat_interleave(group, 0)) * dim**-0.5
    )
    ahead = torch.arange(before + rows, device=DEVICE)[None] > (
        before + torch.arange(rows, device=DEVICE)[:, None]
    )
    weights = scores.masked_fill_(ahead, float("-inf")).softmax(-1)
    expected = torch.einsum("hrt,htd->rhd", weights, values.repeat_interleave(group, 0)).flatten(1)
    prefix: Prefix | None = None
    if with_prefix:
        packed = query.reshape(rows, kv_heads, group, dim).transpose(0, 1).contiguous()
        prefix = attend_prefix(packed, rows, kv, tables[0, : before // BLOCK_TOKENS])
    geometry = type("G", (), {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim})
    shape, tiles = CudaOps(DEVICE).plan_chunks([(0, before, rows, 0)], geometry)  # type: ignore[arg-type]
    assert tiles == plan_tiles([(0, before, rows, 0)], group, shape.rows)
    out = qkv.new_full((rows, heads * dim), float("nan"))
    prefill_attention(qkv, kv, out, tables, torch.tensor(tiles, device=DEVICE).int(), shape, prefix)
    error = relative_error(out, expected)
    logger.info("error %.4f", error)
    assert error < 6e-3
