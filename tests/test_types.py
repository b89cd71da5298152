"""GenerateOptions refuses what makes no sense, naming the field."""

import attrs
import pytest

from agentrt import GenerateOptions
from agentrt.errors import AgentrtError, RequestInvalid

WRONG = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": None},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": -0.1},
    {"temperature": "hot"},
    {"top_k": -1},
    {"top_p": 0},
    {"top_p": 1.01},
    {"top_p": float("nan")},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0},
    {"repetition_penalty": float("inf")},
    {"presence_penalty": float("nan")},
    {"frequency_penalty": float("-inf")},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: float("nan")}},
    {"logit_bias": {"a": 1.0}},
    {"stop": ("",)},
    {"stop": (1,)},
    {"stop_token_ids": (-1,)},
    {"stop_token_ids": ("a",)},
    {"seed": -1},
    {"seed": 1 << 63},
    {"seed": 1.0},
    {"top_logprobs": -1},
    {"top_logprobs": 65},
    {"n": 0},
    {"n": -3},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_value_out_of_range_is_an_error_that_names_the_field(wrong):
    with pytest.raises(RequestInvalid, match=next(iter(wrong))) as caught:
        GenerateOptions(**wrong)
    assert isinstance(caught.value, AgentrtError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="temprature"):
        GenerateOptions(temprature=1.0)


def test_options_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        GenerateOptions(16)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        GenerateOptions().max_tokens = 3


def test_one_stop_string_needs_no_tuple():
    assert GenerateOptions(stop="end").stop == ("end",)
    assert GenerateOptions(stop=["a", "b"]).stop == ("a", "b")


def test_extremes_that_are_allowed():
    GenerateOptions(top_p=1e-9, min_p=1.0, temperature=100, seed=(1 << 63) - 1, top_logprobs=64)
    GenerateOptions(logit_bias={0: float("-inf")})
