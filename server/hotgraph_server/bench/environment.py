"""What a run ran on, for its JSON: versions, machine, commit. It asks this machine only, not the server."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("hotgraph", "grpcio", "protobuf", "numpy", "uvloop", "torch", "transformers")


def describe_environment() -> dict[str, Any]:
    """Versions, processor and commit of this side. What cannot be told is None."""
    commit, is_dirty = git_commit(Path(__file__).parent)
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "num_cpus": usable_cpus(),
        "load_average_before": os.getloadavg()[0],
        "commit": commit,
        "commit_is_dirty": is_dirty,
    }


def usable_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str | None:
    """The CPU's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """The commit checked out where `folder` lies and whether files differ from it; (None, None) outside a checkout."""
    if (commit := _git(folder, "rev-parse", "HEAD")) is None:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no commit yet
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
