import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt.cache.latency import MAX_OBSERVATIONS, MAX_TOOLS, LatencyPrior, ToolLatencies
from agentrt.errors import CacheCorrupt


def learnt(*seconds, name="tool", prior=None):
    latencies = ToolLatencies(prior)
    for second in seconds:
        latencies.observe(name, second)
    latencies.check()
    return latencies


def test_an_unknown_tool_has_the_priors_quantiles():
    latencies = ToolLatencies(LatencyPrior(median_s=2.0, spread=1.0))
    assert latencies.expected("any") == pytest.approx(2.0)
    assert latencies.expected("any", 0.8413447) == pytest.approx(2.0 * 2.718282, rel=1e-4)


def test_a_running_unknown_tool_is_expected_to_take_about_as_long_again():
    latencies = ToolLatencies()
    left = [latencies.expected("any", elapsed_s=elapsed) for elapsed in (1.0, 10.0, 100.0, 1e6)]
    assert left == sorted(left)
    assert 30.0 < left[2] < 100.0


def test_one_observation_tells_most():
    latencies = learnt(100.0)
    assert latencies.expected("tool") == pytest.approx(100.0)


def test_quantiles_of_a_known_distribution():
    generator = random.Random(0)
    latencies = learnt(*(generator.uniform(0.0, 10.0) for _ in range(MAX_OBSERVATIONS)))
    for quantile in (0.1, 0.5, 0.9):
        assert latencies.expected("tool", quantile) == pytest.approx(10 * quantile, abs=1.5)
    assert latencies.expected("tool", elapsed_s=5.0) == pytest.approx(2.5, abs=1.0)


def test_a_log_normal_is_learnt_and_its_rest_is_conditional():
    generator = random.Random(1)
    latencies = learnt(*(generator.lognormvariate(3.0, 0.5) for _ in range(MAX_OBSERVATIONS)))
    assert latencies.expected("tool") == pytest.approx(20.1, rel=0.2)
    # The median of those over 30 s is 35.6 s.
    assert latencies.expected("tool", elapsed_s=30.0) == pytest.approx(5.6, abs=4.0)


def test_two_kinds_of_calls_stay_apart():
    latencies = learnt(*[0.1] * 20, *[60.0] * 10)
    assert latencies.expected("tool") == pytest.approx(0.1)
    assert latencies.expected("tool", elapsed_s=1.0) == pytest.approx(59.0)
    assert latencies.expected("tool", 0.9) == pytest.approx(60.0)


def test_an_outlier_moves_no_median():
    latencies = learnt(*[2.0] * 9, 1e6)
    assert latencies.expected("tool") == pytest.approx(2.0)


def test_a_tool_that_takes_no_time():
    latencies = learnt(*[0.0] * 9)
    assert latencies.expected("tool") == pytest.approx(0.0, abs=1e-5)
    assert latencies.expected("tool", elapsed_s=1.0) > 0.1


def test_an_unknown_tool_is_like_the_known_ones():
    latencies = learnt(*[30.0] * 9, name="known")
    assert latencies.expected("unknown") == pytest.approx(30.0)


def test_a_tool_that_changed_is_learnt_again():
    latencies = learnt(*[1.0] * MAX_OBSERVATIONS, *[50.0] * MAX_OBSERVATIONS)
    assert latencies.expected("tool", 0.05) == pytest.approx(50.0)


def test_memory_is_bounded():
    latencies = ToolLatencies(LatencyPrior(median_s=5.0))
    for number in range(2 * MAX_TOOLS):
        latencies.observe("kept", 1000.0)
        latencies.observe(f"tool {number}", 5.0)
    latencies.check()
    assert repr(latencies) == f"<ToolLatencies {MAX_TOOLS} tools>"
    assert latencies.expected("kept") == pytest.approx(1000.0)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_what_no_clock_measures_is_refused(seconds):
    with pytest.raises(ValueError, match="finite and not negative"):
        ToolLatencies().observe("tool", seconds)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5])
def test_a_quantile_lies_between_0_and_1(quantile):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ToolLatencies().expected("tool", quantile)


def test_a_prior_is_positive():
    with pytest.raises(ValueError, match="median_s"):
        LatencyPrior(median_s=0.0)


@given(
    st.lists(st.floats(0.0, 1e6), max_size=100),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.floats(0.0, 1e6),
)
def test_a_higher_quantile_is_no_sooner_and_none_is_in_the_past(observed, one, other, elapsed_s):
    latencies = learnt(*observed)
    lower, higher = sorted((one, other))
    left = latencies.expected("tool", lower, elapsed_s)
    assert 0.0 <= left <= latencies.expected("tool", higher, elapsed_s)


def _lose_one(latencies):
    latencies._all._ordered.pop()


def _remember_too_many(latencies):
    for number in range(MAX_TOOLS + 1):
        latencies._samples[str(number)] = latencies._all


@pytest.mark.parametrize("corrupt", [_lose_one, _remember_too_many])
def test_check_notices(corrupt):
    latencies = learnt(1.0, 2.0)
    corrupt(latencies)
    with pytest.raises(CacheCorrupt):
        latencies.check()
