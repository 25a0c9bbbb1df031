"""Figures of results, with error bars: `python -m benchmarks.paper.plots FOLDER` draws what lies there as JSON.

It needs matplotlib, which nothing else here does. It measures and computes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import machine_line

SIZE_INCHES = (7.0, 4.5)


@dataclass(frozen=True, slots=True)
class Line:
    """One mode: y over x in milliseconds. `errors` are standard deviations."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """Lines over an axis. `name` makes the file's name."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


def figures(result: dict[str, Any]) -> list[Figure]:
    """What a result of `python -m benchmarks.paper` has to draw; none for commands that are tables only."""
    results = result["results"]
    found = []
    if modes := _run_modes(results.get("ttft", {})):
        found += [_ttft(modes), _ttft_tail(modes)]
    if modes := _run_modes(results.get("decode", {})):
        first = result["settings"]["decode_from"]
        found += [_decode(modes, first), _distribution(modes)]
    return found


def _run_modes(modes: dict[str, Any]) -> dict[str, Any]:
    return {name: mode for name, mode in modes.items() if "not_run" not in mode}


def _ttft(modes: dict[str, Any]) -> Figure:
    lines = []
    for name, mode in modes.items():
        x = [int(length) for length in mode["lengths"]]
        parts = mode["lengths"].values()
        y = [part["summary"]["mean"] * 1e3 for part in parts]
        lines.append(Line(name, x, y, [part["deviation_seconds"] * 1e3 for part in parts]))
    return Figure("ttft", "Time to first token (mean, standard deviation)", "prompt tokens", "ms", lines)


def _ttft_tail(modes: dict[str, Any]) -> Figure:
    lines = []
    for name, mode in modes.items():
        x = [int(length) for length in mode["lengths"]]
        lines.append(Line(name, x, [part["many"]["summary"]["p99"] * 1e3 for part in mode["lengths"].values()]))
    return Figure("ttft-p99", "Time to first token (p99)", "prompt tokens", "ms", lines)


def _decode(modes: dict[str, Any], first: int) -> Figure:
    lines = []
    for name, mode in modes.items():
        y = [seconds * 1e3 for seconds in mode["by_context_seconds"]]
        lines.append(Line(name, [first + 1 + index for index in range(len(y))], y))
    return Figure("decode", "Decode latency by context (median)", "tokens of context", "ms a token", lines)


def _distribution(modes: dict[str, Any]) -> Figure:
    lines = []
    for name, mode in modes.items():
        samples = sorted(mode["all"]["samples_seconds"])
        shares = [(index + 1) / len(samples) for index in range(len(samples))]
        lines.append(Line(name, [sample * 1e3 for sample in samples], shares))
    return Figure("decode-distribution", "Decode latency, distribution", "ms a token", "share of tokens", lines)


def draw(figure: Figure, machine: str, path: Path) -> None:
    """Writes one figure in the form of the path's suffix. Raises ImportError without matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    drawing, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    for line in figure.lines:
        marker = "o" if len(line.x) < 30 else ""
        axes.errorbar(line.x, line.y, yerr=line.errors, label=line.label, marker=marker, markersize=3, capsize=2)
    axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    drawing.text(0.01, -0.01, machine, fontsize=5, va="top")
    drawing.savefig(path, bbox_inches="tight", dpi=150)
    pyplot.close(drawing)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures of the results in a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suffix", choices=("png", "svg", "pdf"), default="svg")
    arguments = parser.parse_args(argv)
    for path in sorted(arguments.folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for figure in figures(result):
            target = arguments.folder / f"{figure.name}.{arguments.suffix}"
            try:
                draw(figure, machine_line(result["environment"]), target)
            except ImportError:
                sys.stderr.write("figures need matplotlib, which is not installed\n")
                return 1
            sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
