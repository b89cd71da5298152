"""Building the native kernels: once, whole or not at all, and what happens where it fails."""

import os
import stat
from pathlib import Path

import pytest
import torch

from agentrt.errors import ConfigError
from agentrt.kernels import native_build
from agentrt.kernels.dispatch import choose_compute, has_avx2, has_fast_int8
from agentrt.kernels.native import Native, NativeOps
from agentrt.kernels.native_build import NativeUnavailable, find_compiler


def has_compiler() -> bool:
    try:
        find_compiler()
    except NativeUnavailable:
        return False
    return has_avx2()


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler, or no AVX2")


def fake_compiler(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def choose(
    cache_dir: Path,
    *,
    dtype: str = "float32",
    weights: str = "auto",
    deterministic: bool = False,
    is_quantised: bool = False,
):
    return choose_compute(
        device="cpu",
        dtype=dtype,
        weights=weights,
        deterministic=deterministic,
        is_quantised=is_quantised,
        cache_dir=cache_dir,
    )


@needs_compiler
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Native.load(tmp_path)
    (built,) = (tmp_path / "kernels").iterdir()
    before = built.stat()
    monkeypatch.setattr(native_build, "_compile", None)  # a second build would fail
    Native.load(tmp_path)
    assert built.stat().st_mtime_ns == before.st_mtime_ns


@needs_compiler
def test_other_flags_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Native.load(tmp_path)
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-DOTHER"))
    Native.load(tmp_path)
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@needs_compiler
def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    compute = choose(in_the_way)
    assert compute.kernels == "native-float32"
    assert os.listdir(tmp_path) == ["file"]


def test_without_a_compiler_torch_serves_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compute = choose(tmp_path)
    assert compute.ops.name == "cpu-dense"
    assert "install one of gcc" in compute.kernels or "AVX2" in compute.kernels
    assert "native CPU kernels" in caplog.text
    with pytest.raises(ConfigError, match="deterministic=True needs the native CPU kernels"):
        choose(tmp_path, deterministic=True)


@needs_compiler
def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_compiler(
        tmp_path,
        "gcc",
        'case "$1" in --version) echo 1.0;; *) echo "no such unit" >&2; exit 1;; esac',
    )
    compute = choose(tmp_path)
    assert compute.ops.name == "cpu-dense"
    assert "no such unit" in compute.note
    assert not list((tmp_path / "kernels").iterdir())


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    writes = (
        'for word; do last=$target; target=$word; done; [ "$1" = --version ] || echo x > "$last"'
    )
    fake_compiler(tmp_path, "gcc", writes)
    with pytest.raises(NativeUnavailable, match="could not be loaded"):
        Native.load(tmp_path)


@needs_compiler
def test_what_is_chosen(tmp_path: Path) -> None:
    assert choose(tmp_path).dtype == torch.float32
    assert isinstance(choose(tmp_path, dtype="auto", deterministic=True).ops, NativeOps)
    assert choose(tmp_path, dtype="bfloat16").ops.name == "cpu-dense"
    with pytest.raises(ConfigError, match="float32"):
        choose(tmp_path, dtype="bfloat16", deterministic=True)
    chosen = choose(tmp_path, dtype="auto", deterministic=True, is_quantised=True)
    name = "int8" if Native.load(tmp_path).has_int8 else "float32"
    assert (chosen.kernels, chosen.weights) == (f"native-{name}", name)


@needs_compiler
def test_slow_int8_products_serve_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 without VNNI."""
    monkeypatch.setattr(Native, "has_int8", False)
    assert choose(tmp_path, dtype="auto", is_quantised=True).kernels == "native-float32"
    with pytest.raises(ConfigError, match="VNNI"):
        choose(tmp_path, dtype="auto", weights="int8")


@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX", "SVE256"])
def test_older_or_other_processors_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    compute = choose(tmp_path, dtype="auto", is_quantised=True)
    assert compute.ops.name == ("cpu-int8" if has_fast_int8() else "cpu-dense")
    assert "no AVX2" in compute.kernels
    if not has_fast_int8():
        with pytest.raises(ConfigError, match=r"native CPU kernels.*no AVX2"):
            choose(tmp_path, dtype="auto", weights="int8")
