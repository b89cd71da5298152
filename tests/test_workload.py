"""Shapes of workloads, the cache budget that a replay recommends, and its picture."""

import json
import random
import runpy
from pathlib import Path

import pytest
from attrs import asdict
from fakes import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from agentrt.cli_bench_plot import plot, windows
from agentrt.cli_workload import Turn, replay
from agentrt.errors import RequestInvalid
from agentrt.workload import SHAPES, SHARES, Sampling, find_shape, sample, shape_json, value_at
from agentrt.workload_budget import CHUNK_TOKENS, budgets, chunk_keys, reuse_distances

ROOT = Path(__file__).parents[1]
TRACES = ROOT.parent / "shared" / "traces"

# ---- shapes


@pytest.mark.skipif(not TRACES.is_dir(), reason="the traces are not there")
def test_the_tables_are_those_of_the_traces():
    derived = runpy.run_path(str(ROOT / "benchmarks" / "workload_shapes.py"))["derived"](TRACES)
    assert set(derived) == set(SHAPES)
    for name, facts in derived.items():
        shape = asdict(SHAPES[name])
        assert {key: shape[key] for key in facts} == facts
        # but for its names, a shape has no number of its own: the airline's trace has no arrivals
        rest = {"name", "source"} | ({"agents_per_s"} if name == "agent" else set())
        assert shape.keys() - facts.keys() == rest


@pytest.mark.parametrize("name", SHAPES)
def test_agents_have_the_shapes_distributions(name):
    shape = SHAPES[name]
    rows = list(sample(shape, Sampling(num_agents=400, vocab_size=50, tokens_scale=0.1)))
    turns = sorted(sum(s.kind == "out" for s in row.segments) for row in rows)
    assert abs(turns[200] - value_at(shape.turns, 0.5)) <= 1
    outputs = sorted(len(s.ids) for row in rows for s in row.segments if s.kind == "out")
    low, high = (0.1 * value_at(shape.output_tokens, at) for at in (0.4, 0.6))
    assert low - 1 <= outputs[len(outputs) // 2] <= high + 1
    shared = rows[0].segments[0].ids[: shape.shared_tokens // 10]
    assert all(row.segments[0].ids[: len(shared)] == shared for row in rows)
    arrivals = [row.arrival_s for row in rows]
    assert arrivals == sorted(arrivals)
    assert 0.8 < arrivals[-1] * shape.agents_per_s / 399 < 1.25
    assert "trace" in shape.source or "tau-bench" in shape.source


def test_the_same_seed_gives_the_same_agents():
    def made(seed):
        return list(sample(SHAPES["agent"], Sampling(num_agents=3, vocab_size=50, seed=seed)))

    assert made(1) == made(1) != made(2)


def test_scales_shorten_lengths_and_waits():
    def total(**scales):
        rows = sample(SHAPES["coding"], Sampling(num_agents=40, vocab_size=50, **scales))
        segments = [segment for row in rows for segment in row.segments]
        return sum(len(s.ids) for s in segments), sum(s.wait_s for s in segments)

    (tokens, wait_s), (few, _), (_, short_s) = (
        total(), total(tokens_scale=0.1), total(time_scale=0.1),
    )  # fmt: skip
    assert few == pytest.approx(0.1 * tokens, rel=0.02)
    assert short_s == pytest.approx(0.1 * wait_s)


@pytest.mark.parametrize("share", SHARES)
def test_quantiles_are_met(share):
    numbers = SHAPES["chat"].turns
    assert value_at(numbers, share) == numbers[SHARES.index(share)]


def test_a_shape_is_a_file_that_can_be_changed(tmp_path):
    path = tmp_path / "mine.json"
    facts = json.loads(shape_json(SHAPES["agent"])) | {"name": "mine", "shared_tokens": 7}
    path.write_text(json.dumps(facts))
    assert find_shape(str(path)).shared_tokens == 7
    for change, why in [
        ({"turns": [1, 2]}, "9 numbers"),
        ({"wait_s": [3, 2, 1, 0, 0, 0, 0, 0, 0]}, "smallest first"),
        ({"colour": "red"}, "must have the fields"),
    ]:
        path.write_text(json.dumps(facts | change))
        with pytest.raises(RequestInvalid, match=why):
            find_shape(str(path))
    with pytest.raises(RequestInvalid, match="none of chat, coding, summarise, agent"):
        find_shape("nothing")


# ---- the budget


def lru_hits(keys, capacity):
    """What a cache of that size has, key by key."""
    held, hits = [], 0
    for key in keys:
        if key in held:
            hits += 1
            held.remove(key)
        held.append(key)
        del held[: max(0, len(held) - capacity)]
    return hits


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 10))
def test_a_distance_says_how_large_a_cache_still_has_it(keys, capacity):
    distances = reuse_distances(keys)
    assert sum(distance <= capacity for distance in distances) == lru_hits(keys, capacity)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_budget_is_enough_and_no_more(keys, share):
    found = budgets(keys, 1, [share])
    endless = lru_hits(keys, len(keys))
    if not endless:
        assert found == []
        return
    capacity = found[0].num_bytes // CHUNK_TOKENS
    assert lru_hits(keys, capacity) > share * endless - 1e-9
    assert lru_hits(keys, capacity - 1) <= share * endless


def test_a_key_stands_for_all_that_comes_before_it():
    one = list(range(4 * CHUNK_TOKENS))
    changed = CHUNK_TOKENS + 1
    other = [*one[:changed], 0, *one[changed + 1 :]]
    mine, its = list(chunk_keys(one)), list(chunk_keys(other))
    assert len(mine) == 4
    assert [a == b for a, b in zip(mine, its, strict=True)] == [True, False, False, False]


# ---- the replay


async def test_a_replay_of_a_shape_notes_when_and_what():
    sampling = Sampling(
        num_agents=3, vocab_size=64, tokens_scale=0.02, time_scale=1e-3, agents_per_s=500
    )
    rows = list(sample(SHAPES["agent"], sampling))
    async with FakeEngine(num_blocks=2000, context=3000, step_tokens=256) as engine:
        report = await replay(engine, rows, concurrency=3, wait_scale=1.0)
        stats = engine.stats()
    assert report.num_cut == 0
    assert len(report.turns) == sum(s.kind == "out" for row in rows for s in row.segments)
    assert sum(turn.output_tokens for turn in report.turns) == stats.output_tokens
    assert all(0 <= turn.at_s <= report.wall_s for turn in report.turns)
    hits = windows(report.turns)
    assert all(0 <= share <= 1 for _, share in hits)
    assert hits[-1][1] > 0.5  # later turns find the earlier ones


def turn(at_s, prompt_tokens, cached_tokens):
    return Turn(
        at_s=at_s, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, output_tokens=1,
        ttft_s=0.01, total_s=0.02,
    )  # fmt: skip


def test_the_hit_rate_is_of_tokens_by_window():
    turns = [turn(0.0, 100, 0), turn(1.0, 300, 300), turn(9.0, 100, 50), turn(10.0, 100, 100)]
    assert windows(turns, 2) == [(2.5, 0.75), (7.5, 0.75)]


def test_the_picture_is_one(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rng = random.Random(1)
    turns = [turn(rng.random() * 10, 100, rng.randrange(100)) for _ in range(50)]
    plot(turns, tmp_path / "run.png", "chat")
    written = (tmp_path / "run.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) > 10_000
    with pytest.raises(RequestInvalid, match="nothing to plot"):
        plot([], tmp_path / "run.png", "chat")
    with pytest.raises(RequestInvalid, match="cannot be written"):
        plot(turns, tmp_path / "no" / "run.png", "chat")
