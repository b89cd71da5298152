"""Seconds of what `benchmarks/soak.py` does for as long as it is asked to."""

import importlib.util
from pathlib import Path

from agentrt.config import default_cache_dir
from agentrt.registry import locate

SMOLLM = str(locate("smollm2-135m", default_cache_dir()))
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def loaded():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_no_tier_passes_its_budget_at_any_step(tmp_path, monkeypatch, capsys):
    soak = loaded()
    monkeypatch.setattr(soak, "CHECK_APART_S", 0.5)
    monkeypatch.setattr(soak, "MOST_GROWTH", 2.0)  # the tiers still fill up in so short a time
    assert await soak.soak(SMOLLM, tmp_path, seconds=3.0, num_sessions=4, seed=1)
    assert "kept" in capsys.readouterr().out


async def test_a_budget_that_is_passed_is_told(tmp_path, monkeypatch, capsys):
    soak = loaded()
    monkeypatch.setattr(soak, "CHECK_APART_S", 0.5)
    monkeypatch.setattr(soak.HostTier, "reserved_bytes", property(lambda _: soak.HOST_BYTES + 1))
    assert not await soak.soak(SMOLLM, tmp_path, seconds=1.0, num_sessions=2, seed=2)
    seen = capsys.readouterr().out
    assert "host: at most 67,108,865 of 67,108,864 bytes (100.0%): passed" in seen
