"""Pictures of what the breakdown measured: `python -m benchmarks.gpu.pictures [RESULT.json ...] --out docs/pictures`.

For each result a roofline (every role of every step, and every whole step) and a timeline of one decode step. It measures
nothing and computes only rates of what is there. Without names it takes the breakdowns in results/gpu. It needs matplotlib,
which nothing else in this folder does.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.floor import Rates, Work
from benchmarks.gpu.report import machine_line

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"

WHOLE = "whole step"
COLOURS = {
    "qkv": "#1f77b4",
    "attention": "#d62728",
    "output": "#2ca02c",
    "gate_up": "#ff7f0e",
    "down": "#9467bd",
    "head": "#8c564b",
    "products": "#1f77b4",
    "norm": "#17becf",
    "rope": "#bcbd22",
    "activation": "#e377c2",
    "sampler": "#7f7f7f",
    "prepare": "#393b79",
    "embedding": "#637939",
    "other": "#c7c7c7",
    WHOLE: "#000000",
}
"""By role; also the order in which legends stand."""
MARKERS = "osD^vPXph<>d"


@dataclass(frozen=True, slots=True)
class Point:
    """All kernels of a role in a step, or the step. intensity: FLOPs a byte that must be moved; rates are per second."""

    step: str
    role: str
    intensity: float
    flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A kernel in time: milliseconds from its step's begin. `alone_ms`: from where all before it have ended."""

    name: str
    role: str
    layer: int | None
    begin_ms: float
    alone_ms: float
    end_ms: float


def points_of(result: dict[str, Any]) -> list[Point]:
    """Roles with products, by the time that they add to a traced step; steps by their own time without tracing.

    A role's bytes are all it moves, a step's those that memory must move.
    """
    found = []
    for name, step in result["results"]["steps"].items():
        for role, part in step["roles"].items():
            seconds = part["added"]["summary"]["p50"]
            if part["work"] is None or part["work"]["flops"] == 0 or seconds <= 0:
                continue
            work = Work(**part["work"])
            found.append(Point(name, role, work.flops / work.all_bytes, work.flops / seconds, work.all_bytes / seconds))
        if step["device"]["summary"] is not None:
            work, seconds = Work(**step["work"]), step["device"]["summary"]["p50"]
            found.append(
                Point(name, WHOLE, work.flops / work.memory_bytes, work.flops / seconds, work.memory_bytes / seconds)
            )
    return found


def bars_of(result: dict[str, Any]) -> tuple[str, list[Bar]] | None:
    """The name and the kernels of the step whose timeline was kept; None where none was."""
    for name, step in result["results"]["steps"].items():
        if step["timeline"]:
            bars = []
            reached = 0.0
            for kernel, role, layer, begin_us, end_us in step["timeline"]:
                alone_us = min(end_us, max(reached, begin_us))
                bars.append(Bar(kernel, role, layer, begin_us / 1e3, alone_us / 1e3, end_us / 1e3))
                reached = max(reached, end_us)
            return name, bars
    return None


def middle_layer(bars: Sequence[Bar]) -> tuple[int, list[Bar]] | None:
    """A layer from the middle of a step, and its kernels; None where layers cannot be told."""
    layers = sorted({bar.layer for bar in bars if bar.layer is not None})
    if not layers:
        return None
    layer = layers[len(layers) // 2]
    return layer, [bar for bar in bars if bar.layer == layer]


def _pyplot() -> Any:
    """Raises ImportError without matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hotgraph"  # the same result gives the same file
    matplotlib.rcParams["font.size"] = 9
    return importlib.import_module("matplotlib.pyplot")


def _save(drawing: Any, result: dict[str, Any], path: Path, pyplot: Any) -> None:
    drawing.text(0.01, -0.01, machine_line(result["environment"]), fontsize=6, va="top")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    drawing.savefig(path, bbox_inches="tight", dpi=130, metadata=metadata)
    pyplot.close(drawing)


def draw_roofline(result: dict[str, Any], path: Path) -> None:
    """FLOP/s and bytes per second over intensity, with what was measured of the device as roofs. Raises ImportError."""
    pyplot = _pyplot()
    lines = importlib.import_module("matplotlib.lines")
    points, rates = points_of(result), Rates.of(result["results"]["rates"])
    steps = list(dict.fromkeys(point.step for point in points))
    markers = dict(zip(steps, itertools.cycle(MARKERS)))
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(12.0, 5.2), layout="constrained")
    low = min([0.5, *(point.intensity for point in points)]) / 2
    high = max([2 * rates.product_flops / rates.copy_bytes, *(point.intensity for point in points)]) * 2
    roofs = []
    for rate, style, label in ((rates.copy_bytes, "-", "copy"), (rates.read_bytes, "--", "sum, only reads")):
        line = {"linestyle": style, "color": "0.45", "linewidth": 1}
        ridge = rates.product_flops / rate
        left.plot([low, ridge, high], [low * rate / 1e12, *[rates.product_flops / 1e12] * 2], **line)
        right.plot([low, high], [rate / 1e12] * 2, **line)
        roofs.append(lines.Line2D([], [], label=f"{label}: {rate / 1e12:.2f} TB/s", **line))
    roofs.append(
        lines.Line2D(
            [], [], linestyle="none", label=f"product: {rates.product_flops / 1e12:.0f} TFLOP/s, the flat roof"
        )
    )
    for point in points:
        is_whole = point.role == WHOLE
        for axes, value in ((left, point.flops / 1e12), (right, point.num_bytes / 1e12)):
            axes.plot(
                point.intensity,
                value,
                markers[point.step],
                color=COLOURS[point.role],
                markersize=9 if is_whole else 6,
                markerfacecolor="none" if is_whole else COLOURS[point.role],
                linestyle="none",
                alpha=1.0 if is_whole else 0.8,
            )
    left.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s", xlim=(low, high))
    right.set(xscale="log", xlabel="FLOPs a byte", ylabel="TB/s", xlim=(low, high))
    right.set_ylim(0, 1.15 * max([rates.read_bytes, rates.copy_bytes, *(point.num_bytes for point in points)]) / 1e12)
    for axes in (left, right):
        axes.grid(visible=True, which="major", alpha=0.3)
    roles = [role for role in COLOURS if any(point.role == role for point in points)]
    handles = [
        lines.Line2D([], [], marker="s", linestyle="none", color=COLOURS[role], label=role) for role in roles
    ] + [
        lines.Line2D([], [], marker=markers[step], linestyle="none", color="0.4", markerfacecolor="none", label=step)
        for step in steps
    ]
    drawing.legend(handles=[*handles, *roofs], loc="outside right upper", fontsize=8, frameon=False)
    drawing.suptitle(f"{result['settings']['config']}: kernels and whole steps under the measured roofs")
    _save(drawing, result, path, pyplot)


def draw_timeline(result: dict[str, Any], path: Path) -> bool:
    """A whole step, and one of its layers enlarged; pale where the kernel before still ran. False: no step was kept.

    Raises ImportError.
    """
    kept = bars_of(result)
    if kept is None:
        return False
    pyplot = _pyplot()
    patches = importlib.import_module("matplotlib.patches")
    name, bars = kept
    enlarged = middle_layer(bars)
    rows = list(dict.fromkeys(bar.role for bar in bars))
    num_below = len(enlarged[1]) if enlarged else 0
    drawing, panels = pyplot.subplots(
        2 if enlarged else 1,
        1,
        figsize=(11.0, 1.6 + 0.3 * (len(rows) + num_below)),
        height_ratios=[len(rows), num_below] if enlarged else None,
        squeeze=False,
        layout="constrained",
    )
    whole = panels[0][0]
    for bar in bars:
        _draw_bar(whole, rows.index(bar.role), bar, 1.0, 0.0)
    whole.set_yticks(range(len(rows)), rows)
    whole.set(
        xlabel="ms from the step's begin", xlim=(0, max(bar.end_ms for bar in bars)), ylim=(len(rows) - 0.4, -0.6)
    )
    whole.set_title(f"{result['settings']['config']}, {name}: {len(bars)} kernels, traced", loc="left")
    if enlarged:
        layer, inside = enlarged
        first = min(bar.begin_ms for bar in inside)
        last = max(bar.end_ms for bar in inside)
        whole.axvspan(first, last, color="0.85", zorder=0)
        below = panels[1][0]
        for index, bar in enumerate(inside):
            _draw_bar(below, index, bar, 1e3, first)
            text = f"{(bar.end_ms - bar.alone_ms) * 1e3:.1f} µs"
            if bar.alone_ms - bar.begin_ms >= 5e-5:  # what one decimal shows
                text += f" (and {(bar.alone_ms - bar.begin_ms) * 1e3:.1f} beside the one before)"
            # On the side where there is room.
            is_late = bar.begin_ms - first > last - bar.end_ms
            place = bar.begin_ms if is_late else bar.end_ms
            below.annotate(
                text,
                ((place - first) * 1e3, index),
                xytext=(-4 if is_late else 4, 0),
                textcoords="offset points",
                ha="right" if is_late else "left",
                va="center",
                fontsize=7,
            )
        below.set_yticks(range(len(inside)), [f"{bar.role} ({bar.name[:24]})" for bar in inside])
        below.set(xlabel="µs", xlim=(0, (last - first) * 1e3), ylim=(len(inside) - 0.4, -0.6))
        below.set_title(f"Layer {layer}, enlarged; pale: while the kernel before still ran", loc="left")
        below.grid(visible=True, axis="x", alpha=0.3)
    whole.grid(visible=True, axis="x", alpha=0.3)
    handles = [
        patches.Patch(color="0.4", label="adds to the step"),
        patches.Patch(color="0.4", alpha=0.3, label="overlaps the kernel before"),
    ]
    drawing.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    _save(drawing, result, path, pyplot)
    return True


def _draw_bar(axes: Any, row: int, bar: Bar, scale: float, first_ms: float) -> None:
    colour = COLOURS[bar.role]
    for begin, end, alpha in ((bar.begin_ms, bar.alone_ms, 0.3), (bar.alone_ms, bar.end_ms, 1.0)):
        if end > begin:
            axes.barh(
                row, (end - begin) * scale, left=(begin - first_ms) * scale, height=0.7, color=colour, alpha=alpha
            )


def draw_all(path: Path, folder: Path, suffix: str) -> list[Path]:
    """Draws what there is in one result; returns the files. Raises ImportError, ValueError for what is no breakdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("name") != "breakdown":
        raise ValueError("no result of the breakdown")
    folder.mkdir(parents=True, exist_ok=True)
    ending = f"{result['settings']['config']}.{suffix}"
    roofline, timeline = folder / f"roofline-{ending}", folder / f"timeline-{ending}"
    found = []
    if points_of(result):
        draw_roofline(result, roofline)
        found.append(roofline)
    if draw_timeline(result, timeline):
        found.append(timeline)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when something could not be drawn."""
    parser = argparse.ArgumentParser(description="Pictures of breakdowns.")
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=PICTURES)
    parser.add_argument("--suffix", choices=("png", "svg", "pdf"), default="svg")
    arguments = parser.parse_args(argv)
    for path in arguments.results or sorted(RESULTS.glob("breakdown*.json")):
        try:
            drawn = draw_all(path, arguments.out, arguments.suffix)
        except ImportError:
            sys.stderr.write("pictures need matplotlib, which is not installed\n")
            return 1
        except ValueError as error:
            sys.stderr.write(f"{path}: {error}\n")
            return 1
        for target in drawn:
            sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
