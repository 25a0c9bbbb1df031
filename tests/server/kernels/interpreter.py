"""Runs a file of tests where Triton interprets its kernels, so that they run without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[3]


def run_interpreted(file: Path, *, timeout_seconds: float = 240) -> None:
    """Runs it in a process of its own, as Triton decides when it is imported; fails with pytest's output if a test fails."""
    plugins = ["-p", "no:cacheprovider", "-p", "tests.server.kernels.quick_interpreter"]
    arguments = ["-m", "pytest", "-q", *plugins, str(file)]
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
