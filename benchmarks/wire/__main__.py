"""What gRPC and Python take between a request and its first token: `python -m benchmarks.wire [--out FILE]`.

The daemon runs over an engine without a model, whose steps take a known time in a thread, and is traced; callers send lone
requests, with a pause between that lets caches and cores go cold, as in life. No GPU is needed. With `--target` a daemon that
runs elsewhere is called instead, and only the callers' side is known.

Parts of the way of a request, in order: (a) caller to servicer, (b) servicer to the scheduler's `submit`, (c) from there to
the engine's thread, then the step itself, (d) from its end to the write of the token, (e) from there to the caller.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.wire import trace
from benchmarks.wire.callers import CALLERS, Answer, build_go, has_go, make_request
from benchmarks.wire.daemon_child import traced_daemon
from hotgraph_server.bench.environment import describe_environment
from hotgraph_server.bench.summary import summarize

SCHEMA: Final = "hotgraph-wire-bench/1"
SENT, RECEIVED = "sent", "received"
PLACES: Final = (
    SENT,
    trace.CALL,
    trace.MESSAGE,
    trace.HANDLER,
    trace.SUBMIT,
    trace.STEP,
    trace.WORK,
    trace.RESULT,
    trace.TOKEN,
    trace.WRITE,
    RECEIVED,
)
PARTS: Final = {
    "a": (SENT, trace.HANDLER),
    "b": (trace.HANDLER, trace.SUBMIT),
    "c": (trace.SUBMIT, trace.WORK),
    "d": (trace.RESULT, trace.WRITE),
    "e": (trace.WRITE, RECEIVED),
}
VOCABULARY_SIZE: Final = 200  # prompts of such tokens: what any model knows
CLOCK_TICKS_PER_SECOND: Final = 100  # of /proc, on every Linux


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the callers that were asked for, prints a table, writes the report."""
    arguments = _arguments(argv)
    if arguments.build_go is not None:
        build_go(arguments.build_go)
        return 0
    begin = datetime.datetime.now(datetime.UTC)
    names = arguments.caller or [name for name in CALLERS if name != "go" or has_go()]
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name in names:
            found = _run(arguments, name)
            results.setdefault(name, []).append(found)
    merged = {name: _merged(rounds) for name, rounds in results.items()}
    report = {
        "schema": SCHEMA,
        "name": "wire",
        "begin_time": begin.isoformat(timespec="seconds"),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "environment": describe_environment(),
        "results": merged,
    }
    print(table(report))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What gRPC and Python take between a request and its first token.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--caller", action="append", choices=tuple(CALLERS), help="default: all that can be had")
    parser.add_argument("--num-requests", type=int, default=200, help="of each caller, in each round")
    parser.add_argument("--num-warmups", type=int, default=20, help="requests before that, which do not count")
    parser.add_argument("--rounds", type=int, default=1, help="each with a daemon of its own")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="pause before each request")
    parser.add_argument("--step-ms", type=float, default=3.0, help="what the engine's steps take")
    parser.add_argument(
        "--awake-cores", type=int, default=0, help="of the daemon; a caller has its own, which may sleep"
    )
    parser.add_argument("--prompt", type=int, default=10, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=2, help="with 1 the end is told with the first token")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--target", help="a daemon that runs already; it is not traced")
    parser.add_argument("--out", type=Path, help="file for the report")
    parser.add_argument(
        "--build-go", type=Path, metavar="FILE", help="build the caller in Go there, and do nothing else"
    )
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace, name: str) -> dict[str, list[float]]:
    """One caller against a daemon of its own: samples in seconds by their names."""
    source = random.Random(arguments.seed)
    num_requests = arguments.num_warmups + arguments.num_requests
    requests = [
        make_request([source.randrange(VOCABULARY_SIZE) for _ in range(arguments.prompt)], arguments.max_tokens)
        for _ in range(num_requests)
    ]
    gap_seconds = arguments.gap_ms / 1e3
    if arguments.target:
        answers = CALLERS[name](arguments.target, requests, gap_seconds)[arguments.num_warmups :]
        return {"total": [answer.token - answer.sent for answer in answers]}
    with traced_daemon(arguments.step_ms / 1e3, arguments.awake_cores) as daemon:
        cpu_seconds, begin_seconds = _cpu_seconds(daemon.process_id), time.perf_counter()
        answers = CALLERS[name](daemon.target, requests, gap_seconds)
        cpu_share = (_cpu_seconds(daemon.process_id) - cpu_seconds) / (time.perf_counter() - begin_seconds)
    samples = _samples(answers[arguments.num_warmups :], daemon.stamps)
    samples["daemon_cpu_share"] = [cpu_share]
    return samples


def _samples(answers: Sequence[Answer], stamps: Sequence[trace.Stamps]) -> dict[str, list[float]]:
    """The lengths of all ways between two places, of the requests of which both sides are known."""
    samples: dict[str, list[float]] = {}
    by_answer = iter([found for found in stamps if trace.WRITE in found])
    found = next(by_answer)
    for answer in answers:
        while found[trace.CALL] < answer.sent:  # of a warm-up
            found = next(by_answer)
        if found[trace.CALL] > answer.ended:
            raise RuntimeError("the trace does not hold a request that was answered")
        places = {**found, SENT: answer.sent, RECEIVED: answer.token}
        for first, second in pairwise(PLACES):
            samples.setdefault(f"{first} to {second}", []).append(places[second] - places[first])
        for part, (first, second) in PARTS.items():
            samples.setdefault(part, []).append(places[second] - places[first])
        total = answer.token - answer.sent
        step = places[trace.RESULT] - places[trace.WORK]
        samples.setdefault("total", []).append(total)
        samples.setdefault("total without step", []).append(total - step)
    return samples


def _merged(rounds: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    merged = {}
    for name in rounds[0]:
        values = [round(value, 7) for found in rounds for value in found[name]]
        summary = summarize(values)
        merged[name] = {"samples_seconds": values, "summary": summary and summary.to_dict()}
    return merged


def table(report: dict[str, Any]) -> str:
    """Medians and 99th percentiles of a report in milliseconds, in Markdown: a row for each way, a column for each caller."""
    callers = list(report["results"])
    names = list(dict.fromkeys(name for found in report["results"].values() for name in found))
    lines = ["| p50 (p99), ms | " + " | ".join(callers) + " |", "|---|" + "---|" * len(callers)]
    for name in names:
        cells = [_cell(name, report["results"][caller].get(name)) for caller in callers]
        lines.append(f"| {_title(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _title(name: str) -> str:
    if name in PARTS:
        first, second = PARTS[name]
        return f"({name}) {first} to {second}"
    return "the daemon's CPU, % of one core" if name == "daemon_cpu_share" else name


def _cell(name: str, found: dict[str, Any] | None) -> str:
    if found is None or found["summary"] is None:
        return ""
    summary = found["summary"]
    if name == "daemon_cpu_share":
        return f"{summary['mean'] * 100:.1f}"
    return f"{summary['p50'] * 1e3:.3f} ({summary['p99'] * 1e3:.3f})"


def _cpu_seconds(process_id: int) -> float:
    """User and system time of a process until now."""
    fields = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_SECOND


if __name__ == "__main__":
    sys.exit(main())
