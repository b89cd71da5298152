"""EngineConfig: strict, frozen, and resolved into whole numbers."""

from pathlib import Path

import attrs
import pytest

from agentrt import EngineConfig
from agentrt.config import default_cache_dir, free_memory_bytes
from agentrt.errors import ConfigError

WRONG = [
    {"device": "tpu"},
    {"dtype": "float16"},
    {"weights": "int3"},
    {"device_kv_bytes": 0},
    {"device_kv_bytes": 1.5},
    {"block_tokens": 0},
    {"max_context_tokens": 1},
    {"max_batch": 0},
    {"max_waiting": -1},
    {"step_tokens": "many"},
    {"deterministic": 1},
    {"namespace": None},
    {"random_weights": "yes"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_value_names_the_field(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(**wrong)


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="max_bach"):
        EngineConfig(max_bach=3)


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        EngineConfig().max_batch = 3
    with pytest.raises(TypeError):
        EngineConfig("cpu")


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTRT_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == EngineConfig().cache_dir == tmp_path
    monkeypatch.delenv("AGENTRT_CACHE_DIR")
    assert EngineConfig().cache_dir == Path("~/.cache/agentrt").expanduser()
    assert EngineConfig(cache_dir="~/x").cache_dir == Path("~/x").expanduser()


def resolve(context=1000, token_bytes=10, **config):
    return EngineConfig(**config).resolve(
        device="cpu", kv_token_bytes=token_bytes, model_context_tokens=context
    )


def test_the_pool_is_whole_blocks_within_its_bytes():
    resolved = resolve(block_tokens=16, device_kv_bytes=16 * 10 * 7 + 159)
    assert (resolved.num_blocks, resolved.pool_tokens) == (7, 112)


def test_a_pool_without_room_says_how_much_it_needs():
    with pytest.raises(ConfigError, match=r"device_kv_bytes=319 .* raise it to 320"):
        resolve(block_tokens=16, device_kv_bytes=319)


def test_the_models_context_is_the_upper_limit():
    assert resolve(max_context_tokens=64).max_context_tokens == 64
    assert resolve(max_context_tokens=5000).max_context_tokens == 1000
    assert resolve().max_context_tokens == 1000


def test_a_pool_of_its_own_choice_is_no_larger_than_useful():
    resolved = resolve(context=100, block_tokens=16, max_batch=2)
    assert resolved.num_blocks == 2 * (7 + 1)


def test_every_running_request_gets_a_row_a_step():
    assert resolve(step_tokens=4, max_batch=9).step_tokens == 9
    assert resolve(step_tokens=40, max_batch=9).step_tokens == 40


def test_free_memory_is_a_number_of_bytes():
    assert free_memory_bytes() > 1 << 20
