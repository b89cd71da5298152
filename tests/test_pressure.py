"""Agents in a pool that holds a third of what they work on, in virtual time: twice alike."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def pressure():
    """The script as a module: it lies in no package, and imports its neighbours."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("pressure", FOLDER / "pressure.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def made_agents(num_agents=24, num_turns=6):
    """A system prompt in common, then turns of their own; one tool in ten takes long."""
    rng = random.Random(5)
    system = [rng.randrange(1, 49000) for _ in range(1300)]

    def turn(first):
        new = [rng.randrange(1, 49000) for _ in range(rng.randrange(40, 250))]
        wait_s = 10.0 if rng.random() < 0.1 else rng.choice([0.0, 0.5])
        return (system + new if first else new), rng.randrange(20, 110), wait_s

    return [[turn(first=number == 0) for number in range(num_turns)] for _ in range(num_agents)]


def test_tiers_by_worth_compute_less_than_lru_and_that_less_than_no_tier(pressure):
    agents = made_agents()
    configs = pressure.three_configs(agents, pressure.KV_TOKEN_BYTES, block_tokens=64)
    runs = {
        name: pressure.run_virtual(agents, config, pressure.Costs())
        for name, config in configs.items()
    }
    least = sum(len(new) for turns in agents for new, _, _ in turns) - 23 * 1300
    assert least <= runs["worth"]["computed"] < 0.9 * runs["lru"]["computed"]
    assert runs["lru"]["computed"] < 0.9 * runs["recompute"]["computed"]
    assert runs["worth"]["wall_s"] < runs["lru"]["wall_s"] < runs["recompute"]["wall_s"]
    again = pressure.run_virtual(agents, configs["worth"], pressure.Costs())
    assert again == runs["worth"]
