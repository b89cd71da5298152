"""Compiles the native kernels for this machine's processor, once, with the system's C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from attrs import frozen

COMPILERS = ("gcc", "clang", "cc")
# Bits must not depend on what a compiler contracts or reorders; the rest of fast math is harmless.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
MOST_OUTPUT_CHARACTERS = 2000
TIMEOUT_S = 120


class NativeUnavailable(Exception):
    """The kernels cannot be built or loaded here; the text says why, and what would help."""


@frozen
class Compiler:
    """A C compiler, and what it says of itself."""

    path: str
    version: str


def find_compiler() -> Compiler:
    """The first of COMPILERS on the path. Raises NativeUnavailable."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            done = _run([path, "--version"])
            if done.returncode == 0:
                return Compiler(path, done.stdout)
    raise NativeUnavailable(f"no C compiler: install one of {', '.join(COMPILERS)}")


def load_library(cache_dir: Path) -> tuple[ctypes.CDLL, str]:
    """Build the kernels, unless `cache_dir` has them already, and load them. Returns the library,
    and a name that no other build has.

    Where `cache_dir` cannot be written the library goes to a temporary folder, and is built anew
    by the next process. Raises NativeUnavailable with the compiler's own words.
    """
    compiler = find_compiler()
    sources = sorted(Path(__file__).parent.glob("native*.[ch]"))
    build = f"native-{_key(sources, compiler)}"
    name = f"{build}.so"
    path = cache_dir / "kernels" / name
    if path.is_file():
        return _load(path), build
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = _compile(compiler, sources, Path(folder) / name)
            os.replace(built, path)  # whole or not at all, whoever else builds it now
        return _load(path), build
    except OSError:  # read-only, full, or no folder: the kernels themselves may still be fine
        with tempfile.TemporaryDirectory() as folder:
            return _load(_compile(compiler, sources, Path(folder) / name)), build


def _key(sources: list[Path], compiler: Compiler) -> str:
    """Tells apart what would give another library: sources, flags, compiler and processor."""
    hasher = hashlib.sha256()
    for part in (*FLAGS, compiler.path, compiler.version, _processor()):
        hasher.update(part.encode() + b"\0")
    for source in sources:
        hasher.update(source.read_bytes() + b"\0")
    return hasher.hexdigest()[:32]


def _processor() -> str:
    """Model and features: a cache folder may be shared between machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    first = info.read_text().split("\n\n", 1)[0]
    kept = ("model name", "vendor_id", "cpu family", "model", "stepping", "flags", "Features")
    lines = [line for line in first.splitlines() if line.split("\t")[0].strip() in kept]
    return "\n".join([platform.machine(), *lines])


def _compile(compiler: Compiler, sources: list[Path], target: Path) -> Path:
    files = [str(source) for source in sources if source.suffix == ".c"]
    done = _run([compiler.path, *FLAGS, *files, "-o", str(target), "-lm"])
    if done.returncode != 0:
        words = done.stderr.strip()[:MOST_OUTPUT_CHARACTERS]
        raise NativeUnavailable(f"{compiler.path} could not build the native kernels: {words}")
    return target


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NativeUnavailable(f"{command[0]} could not be run: {exc}") from exc


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as exc:
        raise NativeUnavailable(f"the native kernels could not be loaded: {exc}") from exc
