"""The simulation of the eviction policies, on small traces whose answers are known."""

import gzip
import importlib.util
import itertools
import json
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.cache import TierRates

PATH = Path(__file__).parents[1] / "benchmarks" / "cache_policy.py"


def load_benchmark():
    """The script as a module: it lies in no package."""
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


policy = load_benchmark()


def trace_of(chains):
    events = [
        policy.Turn(now=float(number), agent="", blocks=tuple(chain))
        for number, chain in enumerate(chains)
    ]
    return policy.Trace(name="made", block_tokens=16, events=events)


def hits_of(chains, num_blocks, kind):
    trace = trace_of(chains)
    if kind == "product":
        rates = TierRates(attention_knee_tokens=1e12)
        return policy.run_product(trace, num_blocks, rates, knows_lengths=True).num_blocks
    chosen = {"lru": policy.Recency, "lfu": policy.Frequency}.get(kind)
    chosen = policy.Belady(trace.events) if chosen is None else chosen()
    return policy.simulate(trace, num_blocks, chosen).num_blocks


def best_possible(chains, num_blocks):
    """The most hits of any way to choose what stays, by trying all."""
    parents = {}
    for chain in chains:
        parents.update(zip(chain, (None, *chain), strict=False))

    @cache
    def best(number, resident):
        if number == len(chains):
            return 0
        hit = len(list(itertools.takewhile(resident.__contains__, chains[number])))
        there = resident | frozenset(chains[number])
        kept = [
            frozenset(some)
            for size in range(min(num_blocks, len(there)) + 1)
            for some in itertools.combinations(sorted(there), size)
            if all(parents[block] is None or parents[block] in some for block in some)
        ]
        return hit + max(best(number + 1, some) for some in kept)

    return best(0, frozenset())


# Chains in a small tree, where each block's number tells its parent: 3 -> 31 -> 312 and so on.
chains = st.lists(st.integers(1, 2), min_size=1, max_size=3).map(
    lambda steps: [int("".join(map(str, steps[: end + 1]))) for end in range(len(steps))]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(chains, min_size=2, max_size=6), st.integers(1, 4))
def test_belady_is_the_optimum_and_nothing_beats_it(made, num_blocks):
    best = best_possible(made, num_blocks)
    assert hits_of(made, num_blocks, "belady") == best
    for kind in ("lru", "lfu", "product"):
        assert hits_of(made, num_blocks, kind) <= best


@settings(deadline=None)
@given(st.lists(chains, max_size=20).filter(len))
def test_with_room_for_all_every_policy_hits_all_that_was_seen(made):
    seen, expected = set(), 0
    for chain in made:
        expected += len(list(itertools.takewhile(seen.__contains__, chain)))
        seen.update(chain)
    assert {hits_of(made, 100, kind) for kind in ("lru", "lfu", "belady", "product")} == {expected}


def test_lru_and_lfu_by_hand():
    made = [[1], [1], [2], [3], [1], [2]]
    assert hits_of(made, 2, "lru") == 1
    assert hits_of(made, 2, "lfu") == 2
    assert hits_of(made, 2, "belady") == 3


def test_leaves_go_first():
    made = [[1, 11, 111], [2], [1, 11, 111]]
    assert [hits_of(made, 3, kind) for kind in ("lru", "lfu", "belady")] == [2, 2, 3]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def shared(tmp_path):
    """Traces in the real ones' form: four requests, and four agents of two turns each."""
    requests = [{"timestamp": 1000 * n, "hash_ids": [0, 1 + n % 2, 3 + n % 2]} for n in range(4)]
    write_rows(tmp_path / "traces/mooncake_conversation.jsonl.gz", requests)
    answer = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "{}"}]}
    talk = [{"role": "user"}, answer, {"role": "tool"}, {"role": "assistant"}]
    agents, conversations = [], []
    for number in range(4):
        first = [*range(48), number] + [7] * 15
        segments = [["in", first, 0.0], ["out", [1] * 20, 2.0], ["in", [5] * 8, 0.0]]
        segments.append(["out", [2] * 10, 0.0])
        agents.append({"id": f"agent {number}", "segments": segments})
        conversations.append({"id": f"agent {number}", "messages": talk})
    write_rows(tmp_path / "traces/tau_airline_tokens.jsonl.gz", agents)
    write_rows(tmp_path / "traces/tau_airline.jsonl.gz", conversations)
    return tmp_path


def test_the_agents_events_follow_each_other_as_when_replayed(shared):
    service = policy.Service(num_agents=2, prefill_tokens_per_s=64.0, decode_tokens_per_s=10.0)
    events = policy.airline(shared, "all", service).events
    mine = [event for event in events if event.agent == "agent 0"]
    assert [type(event).__name__ for event in mine] == [
        "Turn",
        "TurnEnd",
        "Turn",
        "TurnEnd",
        "Close",
    ]
    # 64 tokens in, 20 out; 2 s of tool; 8 in, 10 out.
    assert [event.now for event in mine] == pytest.approx([0.0, 3.0, 5.0, 6.125, 6.125])
    assert [len(event.blocks) for event in mine[:-1]] == [4, 5, 5, 6]
    assert [event.tool for event in (mine[1], mine[3])] == ["look", None]
    third = next(event for event in events if event.agent == "agent 2")
    assert third.now == pytest.approx(6.125)
    assert third.blocks[:3] == mine[0].blocks[:3]
    assert third.blocks[3] != mine[0].blocks[3]
    assert [event.now for event in events] == sorted(event.now for event in events)


def test_the_table_and_the_json_agree(shared, monkeypatch, capsys):
    monkeypatch.setattr(policy, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(policy, "eviction_us", lambda num_leaves, num_victims: 1.0)
    arguments = ["cache_policy.py", "--shared", str(shared), "--json", str(shared / "out.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    status = policy.main()
    report = json.loads((shared / "out.json").read_text())
    output = capsys.readouterr().out
    assert [(row["trace"], row["share"]) for row in report["rows"]] == [
        ("mooncake", 0.5), ("mooncake", 1.0), ("airline", 0.5), ("airline", 1.0),
    ]  # fmt: skip
    for row in report["rows"]:
        assert f"{row['ours']:,}" in output
        assert row["lru"] <= row["belady"] <= row["unbounded"]
        if row["share"] == 1.0:
            assert row["ours"] == row["unbounded"]
    assert status == bool(policy.failures(report["rows"]))


def test_a_bar_that_does_not_hold_is_named():
    good = {"trace": "airline", "share": 0.02, "lru": 10, "ours": 15, "way": 0.5}
    assert policy.failures([good]) == []
    assert len(policy.failures([{**good, "way": 0.4}, {**good, "ours": 9}])) == 2


def test_the_timing_takes_out_as_many_as_it_says():
    assert policy.eviction_us(100, 500) > 0.0
