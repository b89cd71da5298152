"""KV between a GPU's pool and the host tier: byte for byte, and through an engine."""

import asyncio
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import DEVICE, needs_gpu
from test_gpu_engine import SHAPE

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.mover import Part
from agentrt.transfer_cuda import CudaCopier, allocate_pinned

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


def test_parts_come_back_as_they_were() -> None:
    """Chunks that begin and end inside blocks, while the step's stream rewrites the pool."""
    torch.manual_seed(0)
    pool = torch.randn(3, 2, 12, 2, 16, 32, device=DEVICE).bfloat16()
    before = pool.clone()
    copier, token_bytes = CudaCopier.over(pool), 3 * 2 * 2 * 32 * 2
    blocks, saved = (7, 2, 9, 4), []
    for start, end in ((0, 24), (24, 48), (48, 57)):
        view = allocate_pinned((end - start) * token_bytes)
        part = Part(start=start, num_tokens=end - start, first=start, end=end, view=view)
        copier.save(part, blocks, copier.begin())
        saved.append(part)
    copier.sync()
    pool.zero_()
    other = (0, 1, 3, 5)
    for part in saved:
        source = part.view if part.start == 24 else np.array(part.view)  # as from disk
        copier.load(part, source, other, copier.begin())
    copier.sync()
    for index, (block, source) in enumerate(zip(other, blocks, strict=True)):
        num = min(16, 57 - 16 * index)
        assert torch.equal(pool[:, :, block, :, :num], before[:, :, source, :, :num])
    assert not pool[:, :, 5, :, 57 - 48 :].any()
    assert not pool[:, :, 2].any()


async def test_an_engine_under_pressure_continues_as_one_with_room(folder: Path) -> None:
    """Ten conversations in a pool that holds three: what comes back from the host is what was
    computed, so each continuation's first token is as likely as with room for all."""
    base = {"device": "cuda", "random_weights": True, "max_batch": 8, "disk_kv_bytes": 0}
    token_bytes = 3 * 2 * 2 * 128 * 2
    prompts = [[random.Random(i).randrange(2048) for _ in range(3000)] for i in range(10)]
    options = GenerateOptions(max_tokens=8, ignore_eos=True, top_logprobs=5)
    found = []
    for pool_tokens, host_bytes in ((40_000, 0), (10_240, 64_000 * token_bytes)):
        config = EngineConfig(
            **base, device_kv_bytes=pool_tokens * token_bytes, host_kv_bytes=host_bytes
        )
        async with Engine(folder, config) as engine:
            await asyncio.gather(*(engine.generate(prompt, options) for prompt in prompts))
            await asyncio.sleep(1.0)
            again = [await engine.generate([*prompt, 5, 6, 7], options) for prompt in prompts]
            await engine.check()
            found.append((again, engine.stats()))
    (roomy, _), (pressed, stats) = found
    assert stats.loaded_tokens["host"] > 2_000
    for one, other in zip(roomy, pressed, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        expected = dict(one.logprobs[0].top)
        got = dict(other.logprobs[0].top)
        common = expected.keys() & got.keys()
        assert len(common) >= 4
        assert max(abs(expected[i] - got[i]) for i in common) < 0.02
