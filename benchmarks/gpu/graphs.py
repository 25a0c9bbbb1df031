"""What graphs cost: time by phase and bytes of many captures, and a process from start to first token with and without them.

`python -m benchmarks.gpu.graphs --device cuda --config llama2-7b --num 200 --out graphs.json`. Every graph is captured
twice: into an empty cache, and again after all were evicted, when what they held can be used anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import goals
from benchmarks.gpu.files import write_folder
from benchmarks.gpu.keys import step_keys
from benchmarks.gpu.models import Loaded, make_loaded
from benchmarks.gpu.report import (
    Report,
    device_of,
    dtype_of,
    machine_line,
    make_parser,
    milliseconds,
    run_ahead_of,
    say,
    summary_of,
)
from benchmarks.gpu.service import Service, failures, make_settings, run, serving
from graphcache import Event, EventType
from hotgraph_server.batch import StepKey
from hotgraph_server.config import GIB, MIB, GraphSettings

PHASES = ("record", "instantiate", "verify", "publish", "total")
CHILD_SECONDS = 300.0


async def capture_many(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> None:
    """Both laps; results and checks go into the report."""
    settings = make_settings(
        loaded, num_slots=arguments.slots, kv_tokens=arguments.slots * 64, graphs=GraphSettings(budget_bytes=16 * GIB)
    )
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        keys = step_keys(service)[: arguments.num]
        report.check("there are so many shapes", is_passed=len(keys) == arguments.num, detail=f"{len(keys)} there are")
        await service.settle()  # the engine's own, the first of which sets libraries up
        service.evict_all()
        laps = []
        for name in ("into an empty cache", "again, after all were evicted"):
            laps.append({"name": name, **await _lap(service, report, keys, loaded.model.device)})
            service.evict_all()
        report.results["laps"] = laps


async def _lap(service: Service, report: Report, keys: Sequence[StepKey], device: torch.device) -> dict[str, Any]:
    cache = service.engine.graphs
    moments: dict[str, dict[EventType, float]] = {}

    def note(event: Event[StepKey]) -> None:
        if event.graph is not None:
            moments.setdefault(event.graph.name, {})[event.type] = time.perf_counter()

    cache.add_listener(note)
    free_before = _free_bytes(device)
    begin_seconds = time.perf_counter()
    infos = await service.warm(keys)
    wall_seconds = time.perf_counter() - begin_seconds
    free_after = _free_bytes(device)
    cache.remove_listener(note)
    report.check("every graph was captured", is_passed=not failures(infos), detail=failures(infos))
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for info in infos:
        if info.capture is None:
            continue
        seen = moments[info.name]
        done_before = seen.get(EventType.VERIFIED, seen[EventType.CAPTURED])
        parts = {
            "record": info.capture.record_seconds,
            "instantiate": info.capture.instantiate_seconds,
            "verify": info.capture.verify_seconds,
            "publish": seen[EventType.PUBLISHED] - done_before,
        }
        for phase, value in parts.items():
            seconds[phase].append(value)
        seconds["total"].append(sum(parts.values()))
    sizes = [info.size_bytes for info in infos]
    budget = cache.budget()
    say(f"{len(infos)} captures in {wall_seconds:.2f} s, {budget.used_bytes / MIB:.1f} MiB in the budget")
    return {
        "num_graphs": len(infos),
        "wall_seconds": wall_seconds,
        "phases": {phase: summary_of(values) for phase, values in seconds.items()},
        "graphs": [{"name": info.name, "size_bytes": info.size_bytes} for info in infos],
        "mean_bytes": sum(sizes) / len(sizes) if sizes else None,
        "budget_used_bytes": budget.used_bytes,
        "device_bytes": None if free_before is None or free_after is None else free_before - free_after,
    }


def _free_bytes(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def start_up(arguments: argparse.Namespace, report: Report) -> list[dict[str, Any]]:
    """Processes from start to first token: at once with captures in the background, and with all captured before."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hotgraph-bench-") as temporary:
        folder = Path(temporary) if arguments.from_files else None
        if folder is not None:
            write_folder(folder, arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
        for num_first in dict.fromkeys((0, arguments.capture_first)):
            runs = [_start_once(arguments, num_first, folder) for _ in range(arguments.starts)]
            last = [found["first_token"] for found in runs]
            name = f"{num_first} graphs captured first" if num_first else "captures in the background"
            rows.append({"name": name, "num_first": num_first, "runs": runs, "first_token": summary_of(last)})
            say(f"start to first token, {name}: {min(last):.2f} to {max(last):.2f} s")
    return rows


def _start_once(arguments: argparse.Namespace, num_first: int, folder: Path | None) -> dict[str, float]:
    """Raises CalledProcessError or TimeoutExpired."""
    command = [sys.executable, "-m", "benchmarks.gpu.first_token", "--device", arguments.device]
    command += ["--config", arguments.config, "--run-ahead", str(run_ahead_of(arguments))]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    command += ["--capture-first", str(num_first)] if num_first else []
    command += ["--folder", str(folder)] if folder is not None else []
    paths = [str(Path(__file__).parents[2]), *sys.path]  # the child finds what this process found
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    begin = ["--begin", str(time.perf_counter())]
    done = subprocess.run(
        command + begin, env=environment, stdout=subprocess.PIPE, text=True, timeout=CHILD_SECONDS, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result."""
    results = result["results"]
    lines = []
    if "laps" in results:
        lines += ["Capturing a step graph, ms: p50 (p99)", ""]
        lines += [
            "| | graphs | record | instantiate or update | verify | publish | sum |",
            "|---|---|---|---|---|---|---|",
        ]
        for lap in results["laps"]:
            cells = [
                f"{milliseconds(lap['phases'][phase])} ({milliseconds(lap['phases'][phase], 'p99')})"
                for phase in PHASES
            ]
            lines.append(f"| {lap['name']} | {lap['num_graphs']} | {' | '.join(cells)} |")
        lines += ["", "| | MiB a graph | MiB in the budget | MiB of the device's free memory |", "|---|---|---|---|"]
        for lap in results["laps"]:
            of_device = "" if lap["device_bytes"] is None else f"{lap['device_bytes'] / MIB:.1f}"
            mean = lap["mean_bytes"] / MIB
            lines.append(f"| {lap['name']} | {mean:.3f} | {lap['budget_used_bytes'] / MIB:.1f} | {of_device} |")
        lines.append("")
    if "starts" in results:
        source = "read from files" if result["settings"]["from_files"] else "made on the device, not read"
        lines += [f"Process start to first token, seconds, smallest of the runs; weights {source}", ""]
        lines += ["| | imports | model | engine | captured | first token |", "|---|---|---|---|---|---|"]
        for row in results["starts"]:
            best = min(row["runs"], key=lambda found: float(found["first_token"]))
            cells = [f"{best[name]:.2f}" if name in best else "" for name in ("imports", "model", "engine", "captured")]
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {best['first_token']:.2f} |")
        if result["settings"]["config"] == goals.CONFIG:
            lines += ["", f"Goal {goals.START_SECONDS.goal:g} s, gate {goals.START_SECONDS.gate:g} s, from page cache."]
        lines.append("")
    return "\n".join([*lines, machine_line(result["environment"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Captures by phase and bytes; process start to first token.")
    parser.add_argument("--num", type=int, default=200, help="graphs to capture; 0 leaves this part out")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--starts", type=int, default=3, help="processes of each kind; 0 leaves this part out")
    parser.add_argument(
        "--capture-first",
        type=int,
        default=100,
        help="graphs of the process that captures before it serves; 0: no such process",
    )
    parser.add_argument(
        "--from-files", action="store_true", help="the processes read the weights from files, once written"
    )
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("graphs", arguments)
    if arguments.starts:  # first, while this process holds nothing of the device
        report.results["starts"] = start_up(arguments, report)
    if arguments.num:
        loaded = make_loaded(arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
        run(lambda: capture_many(arguments, report, loaded))
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
