"""What a benchmark leaves behind: its JSON with machine, versions, settings, raw samples and checks, and its exit status.

It knows no model and no engine. Times are in seconds in the JSON and in milliseconds in tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import DTYPES, SHAPES
from hotgraph_server.bench.environment import describe_environment
from hotgraph_server.bench.summary import summarize

NUM_DECIMALS = 7
SCHEMA = "hotgraph-gpu-bench/1"
COMMIT_VARIABLE = "HOTGRAPH_COMMIT"
_PACKAGES = ("triton", "cuda-bindings", "vllm", "tensorrt-llm")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--config", choices=tuple(SHAPES), default="llama2-7b", help="the model's shape")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float16 on CUDA, float32 on the CPU")
    parser.add_argument("--run-ahead", type=int, help="steps ahead of the one that is read; default: 1 on CUDA, else 0")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Raises SystemExit for a CUDA device that is not there: never the CPU in its place."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu runs on the CPU")
    return torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    return DTYPES[arguments.dtype or ("float16" if arguments.device == "cuda" else "float32")]


def run_ahead_of(arguments: argparse.Namespace) -> int:
    if arguments.run_ahead is not None:
        return int(arguments.run_ahead)
    return 1 if arguments.device == "cuda" else 0


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,4` as an argument's type. Raises ValueError."""
    return tuple(int(part) for part in text.split(","))


class Report:
    """One run: results and checks as they come, then one file. A check that fails makes `finish` return 1."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.results: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []
        self._settings = {key: _plain(value) for key, value in vars(arguments).items()}
        self._environment = machine(device_of(arguments))
        self._begin = datetime.datetime.now(datetime.UTC)

    def check(self, name: str, *, is_passed: bool, detail: str = "") -> None:
        """Notes one correctness check, and says so at once when it failed."""
        self.checks.append({"name": name, "is_passed": is_passed, "detail": detail})
        if not is_passed:
            say(f"CHECK FAILED: {name}: {detail}")

    @property
    def is_passed(self) -> bool:
        return all(check["is_passed"] for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.name,
            "begin_time": self._begin.isoformat(timespec="seconds"),
            "settings": self._settings,
            "environment": self._environment,
            "checks": self.checks,
            "results": _rounded(self.results),
        }

    def finish(self, path: Path | None) -> int:
        """Writes the JSON, when there is a path, and returns the process's exit status."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            say(f"wrote {path}")
        num_failed = sum(not check["is_passed"] for check in self.checks)
        say(f"{self.name}: {len(self.checks)} checks, {num_failed} failed")
        return 0 if self.is_passed else 1


def machine(device: torch.device) -> dict[str, Any]:
    """What this runs on. The commit is HOTGRAPH_COMMIT's where that is set: a copy of the tree may have no git."""
    environment = describe_environment()
    environment["commit"] = os.environ.get(COMMIT_VARIABLE) or environment["commit"]
    environment["packages"] |= {name: _version(name) for name in _PACKAGES}
    environment["device"] = device.type
    environment["cuda"] = torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = properties.name
        environment["gpu_memory_bytes"] = properties.total_memory
        environment["driver"] = _driver()
    return environment


def machine_line(environment: dict[str, Any]) -> str:
    """One line under a table: where its figures come from."""
    packages = environment["packages"]
    place = environment.get("gpu") or environment.get("processor") or "an unnamed CPU"
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if packages[name])
    return f"{place}{driver}, {versions}, commit {environment['commit'] or 'unknown'}"


def summary_of(samples: Sequence[float], *, max_kept: int | None = None) -> dict[str, Any]:
    """Raw samples in seconds and what they come to; `summary` is None when there are none.

    Of more than `max_kept` samples every n-th is kept, n being `samples_every`; the summary is of all.
    """
    found = summarize(samples)
    every = 1 if max_kept is None else max(1, -(-len(samples) // max_kept))
    return {"samples_seconds": list(samples[::every]), "samples_every": every, "summary": found and found.to_dict()}


def milliseconds(part: dict[str, Any] | None, name: str = "p50") -> str:
    """A figure of `summary_of` for a table; empty where there is none."""
    if part is None or part["summary"] is None:
        return ""
    return f"{part['summary'][name] * 1e3:.2f}"


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _rounded(value: Any) -> Any:
    """The same with floats to a tenth of a microsecond, where they are seconds: clocks tell no more, and files are shorter."""
    if isinstance(value, float):
        return round(value, NUM_DECIMALS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # not installed beside the driver
        return None
    return done.stdout.splitlines()[0].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
