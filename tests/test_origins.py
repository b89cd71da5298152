"""Where prompt tokens came from: every token once, whatever a request goes through."""

from hypothesis import given
from hypothesis import strategies as st

from agentrt.origins import Origins, Tally

TIERS = ("device", "host", "disk")


def test_what_is_computed_again_is_no_part_of_the_prompt():
    origins = Origins(100)
    origins.found(30)
    origins.loaded(30, 70, {"host": 10, "disk": 30})
    origins.computed(70, 100)
    assert origins.own == Tally({"device": 30, "host": 10, "disk": 30}, computed=30)
    origins.found(20)  # preempted while it decoded its 5th token
    origins.loaded(20, 60, {"host": 40})
    origins.computed(60, 105)
    assert origins.own == Tally({"device": 30, "host": 10, "disk": 30}, computed=30, again=45)


def test_a_load_that_reaches_further_counts_from_there_on():
    origins = Origins(100)
    origins.computed(0, 50)
    origins.loaded(20, 90, {"host": 50, "disk": 20})
    assert origins.own == Tally({"device": 0, "host": 20, "disk": 20}, computed=50)


@given(
    st.integers(1, 60), st.lists(st.lists(st.tuples(st.sampled_from("flc"), st.integers(1, 30))))
)
def test_each_token_of_a_prompt_has_one_origin(num_tokens, lives):
    """A life is what happens from an admission to a preemption, front to back."""
    total = Tally()
    one, other = Origins(num_tokens, total=total), Origins(num_tokens, total=total)
    other.computed(0, num_tokens)
    furthest = 0
    for life in lives:
        end = 0
        for kind, more in life:
            start, end = end, end + more
            if kind == "f":
                one.found(end)
            elif kind == "l":
                one.loaded(start, end, {"host": more // 2, "disk": more - more // 2})
            else:
                one.computed(start, end)
        furthest = max(furthest, end)
    assert one.own.known == min(furthest, num_tokens)
    assert total.known == one.own.known + num_tokens
    assert all(total.tiers[tier] == one.own.tiers[tier] for tier in TIERS)
