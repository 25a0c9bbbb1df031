"""What captures cost those who are served, and what a miss costs: inter-token latency with and without captures.

`python -m benchmarks.gpu.interference --device cuda --config llama2-7b --out interference.json`. The phases alternate while
the same streams run: quiet, captures within the daemon's default stall budget, captures back to back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.models import Loaded, make_loaded, random_prompt
from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.report import (
    Report,
    device_of,
    dtype_of,
    machine_line,
    make_parser,
    milliseconds,
    numbers,
    run_ahead_of,
    say,
    summary_of,
)
from benchmarks.gpu.service import (
    EAGER,
    WARM_SECONDS,
    Completion,
    Service,
    failures,
    make_settings,
    run,
    serving,
)
from graphcache import Event, EventType, GraphState, GraphStateError, Priority, UnknownGraphError
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.config import GraphSettings

NUM_CHECKED_TOKENS = 16
PHASES: tuple[tuple[str, float | None], ...] = (
    ("quiet", None),
    ("captures, default stall budget", GraphSettings().stall_budget_seconds),
    ("quiet again", None),
    ("captures, back to back", 1.0),
)
"""Name, and the stall budget (seconds a second) of its captures; None: no captures."""

TOKENS_BETWEEN = 250  # two captures that take turns with steps


async def measure(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> None:
    """Both parts; results and checks go into the report."""
    longest = max(
        max(arguments.miss_lengths) + 2,
        arguments.prompt + _tokens_of_stream(arguments),
        arguments.prompt + NUM_CHECKED_TOKENS,
    )
    settings = make_settings(loaded, num_slots=max(8, arguments.streams), kv_tokens=arguments.streams * longest)
    source = random.Random(arguments.seed)
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        await service.settle()
        report.results["misses"] = await _misses(service, arguments, report, source)
        service.evict_all()
        report.results["phases"] = await _phases(service, arguments, report, source)


# Captures beside steady streams.


def _tokens_of_stream(arguments: argparse.Namespace) -> int:
    """Of all phases, and of what lies between them: captures that are still to end."""
    return int(len(PHASES) * (arguments.phase_tokens + TOKENS_BETWEEN) + 64)


async def _phases(
    service: Service, arguments: argparse.Namespace, report: Report, source: random.Random
) -> list[dict[str, Any]]:
    infos = await service.warm([service.decode_key(arguments.streams), service.prompt_key(arguments.prompt)])
    report.check("the streams' graphs were captured", is_passed=not failures(infos), detail=failures(infos))
    gaps: list[list[float]] = [[] for _ in PHASES]
    num_captures = [0] * len(PHASES)
    seconds = [0.0] * len(PHASES)
    for index in range(1 + arguments.rounds):  # the first is not measured
        # Contexts grow and steps with them, so that each phase has each place in turn.
        order = [(place + index) % len(PHASES) for place in range(len(PHASES))]
        completions, windows = await _round(service, arguments, source, order)
        if index == 0:
            continue
        for phase, (begin, end, captures) in zip(order, windows, strict=True):
            num_captures[phase] += captures
            seconds[phase] += end - begin
            for completion in completions:
                inside = [moment for moment in completion.token_seconds if begin <= moment <= end]
                gaps[phase] += [later - earlier for earlier, later in itertools.pairwise(inside)]
    request = service.request(
        random_prompt(arguments.prompt, service.engine.info.vocabulary_size, source), NUM_CHECKED_TOKENS
    )
    verdict = await Oracle(service).check(request, (await service.complete(request)).token_ids)
    report.check("tokens are the eager ones", is_passed=verdict.mismatch is None, detail=verdict.mismatch or "")
    found = []
    for phase, (name, budget) in enumerate(PHASES):
        part = summary_of(gaps[phase])
        found.append(
            {
                "name": name,
                "stall_budget_seconds": budget,
                "num_captures": num_captures[phase],
                "seconds": seconds[phase],
                "gaps": part,
            }
        )
        report.check(f"{name}: there were tokens", is_passed=part["summary"] is not None)
        if budget is not None:
            report.check(f"{name}: there were captures", is_passed=num_captures[phase] > 0)
        say(f"{name}: gaps p50 {milliseconds(part)} p99 {milliseconds(part, 'p99')} ms, {num_captures[phase]} captures")
    return found


async def _round(
    service: Service, arguments: argparse.Namespace, source: random.Random, order: Sequence[int]
) -> tuple[list[Completion], list[tuple[float, float, int]]]:
    """One life of the streams through all phases in this order; (begin, end, captures) of each phase."""
    vocabulary_size = service.engine.info.vocabulary_size
    completions = [Completion(0.0) for _ in range(arguments.streams)]
    total = _tokens_of_stream(arguments)
    tasks = [
        asyncio.create_task(
            service.complete(
                service.request(random_prompt(arguments.prompt, vocabulary_size, source), total), completion=completion
            )
        )
        for completion in completions
    ]

    async def until(num_tokens: int) -> None:
        """Returns when every stream has so many tokens more; raises what a stream raised, and when they end before."""
        wanted = min(len(completion.token_ids) for completion in completions) + num_tokens
        while min(len(completion.token_ids) for completion in completions) < wanted:
            for task in tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("the streams ended within a phase; take more --phase-tokens")
            await asyncio.sleep(0.002)

    windows = []
    try:
        await until(1)
        await _settle_quickly(service)
        for phase in order:
            _, budget = PHASES[phase]
            before = service.engine.graphs.stats().num_captures
            capturer = None
            if budget is not None:
                service.engine.graphs.update_budget(stall_budget_seconds=budget)
                capturer = asyncio.create_task(_capture_in_a_loop(service, arguments.streams, source))
            begin = time.perf_counter()
            await until(arguments.phase_tokens)
            end = time.perf_counter()
            windows.append((begin, end, service.engine.graphs.stats().num_captures - before))
            if capturer is not None:
                capturer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await capturer
                await _settle_quickly(service)
    finally:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return completions, windows


async def _settle_quickly(service: Service) -> None:
    """Lets what was asked for end without a stall budget, so that nothing of it reaches the next phase."""
    service.engine.graphs.update_budget(stall_budget_seconds=1.0)
    await service.settle()


async def _capture_in_a_loop(service: Service, num_streams: int, source: random.Random) -> None:
    """Keeps the capture thread busy with shapes that nobody uses: asks for some, evicts them when they are there."""
    cache = service.engine.graphs
    used = {service.decode_key(num_streams), *(service.decode_key(rows) for rows in range(1, num_streams + 1))}
    keys = [
        key
        for tokens in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
        for sampler in Sampler
        if (key := service.prompt_key(tokens, sampler)) is not None and key not in used
    ]
    keys = list(dict.fromkeys(keys))
    while True:
        for info in cache.list([GraphState.READY]):
            if info.key not in used:
                with contextlib.suppress(GraphStateError, UnknownGraphError):
                    cache.evict(info.name)
        missing = [key for key in keys if cache.lookup(key) is None]
        source.shuffle(missing)
        for key in missing[: max(0, 2 - cache.stats().num_pending)]:  # few, so that little is left at the phase's end
            cache.request(key, Priority.OPERATOR)
        await asyncio.sleep(0.02)  # long enough not to be a disturbance of its own


# Misses.


async def _misses(
    service: Service, arguments: argparse.Namespace, report: Report, source: random.Random
) -> list[dict[str, Any]]:
    """For each length: eager, then the first request of a shape that no graph holds, then hits."""
    vocabulary_size = service.engine.info.vocabulary_size
    published: dict[StepKey, float] = {}

    def note(event: Event[StepKey]) -> None:
        if event.type is EventType.PUBLISHED and event.graph is not None:
            published[event.graph.key] = time.perf_counter()

    cache = service.engine.graphs
    cache.add_listener(note)
    rows = []
    try:
        # The capture thread's first capture sets libraries up; it is nobody's miss.
        await service.warm([service.decode_key(1)])
        for length in arguments.miss_lengths:
            key = service.prompt_key(length)
            if key is None:
                continue
            eager, missed, hit, ready_after = [], [], [], []
            num_wrong = 0
            for index in range(arguments.miss_rounds):
                await service.settle()
                service.evict_all()  # a larger graph would stand in
                await asyncio.sleep(arguments.gap_ms / 1e3)
                alone = await service.complete(
                    service.request(random_prompt(length, vocabulary_size, source), 1, policy=EAGER)
                )
                await asyncio.sleep(arguments.gap_ms / 1e3)
                published.pop(key, None)
                first = await service.complete(service.request(random_prompt(length, vocabulary_size, source), 1))
                num_wrong += first.receipt is None or first.receipt.num_eager_steps == 0
                async with asyncio.timeout(WARM_SECONDS):
                    while key not in published:  # noqa: ASYNC110 the event comes on another thread
                        await asyncio.sleep(0.001)
                await asyncio.sleep(arguments.gap_ms / 1e3)
                second = await service.complete(service.request(random_prompt(length, vocabulary_size, source), 1))
                num_wrong += not second.is_all_graphs
                if index:  # the first eager step of a shape loads kernels
                    eager.append(alone.ttft_seconds)
                    missed.append(first.ttft_seconds)
                    hit.append(second.ttft_seconds)
                    ready_after.append(published[key] - first.submit_seconds)
            report.check(
                f"prompts of {length} missed once and hit then", is_passed=num_wrong == 0, detail=f"{num_wrong} did not"
            )
            rows.append(
                {
                    "prompt_tokens": length,
                    "graph": str(key),
                    "eager": summary_of(eager),
                    "miss": summary_of(missed),
                    "hit": summary_of(hit),
                    "ready_after": summary_of(ready_after),
                }
            )
            say(
                f"a miss at {length}: {milliseconds(rows[-1]['miss'])} ms, ready {milliseconds(rows[-1]['ready_after'])} ms"
            )
    finally:
        cache.remove_listener(note)
    return rows


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result."""
    phases = result["results"]["phases"]
    quiet = statistics.fmean(_p99(phase) for phase in phases if phase["stall_budget_seconds"] is None)
    streams = result["settings"]["streams"]
    target = goals.CAPTURE_P99_RATIO
    lines = [
        f"Inter-token latency of {streams} steady streams, ms",
        "",
        "| phase | p50 | p99 | p99 over the mean quiet p99 | captures a second |",
        "|---|---|---|---|---|",
    ]
    for phase in phases:
        ratio = _p99(phase) / quiet
        rate = phase["num_captures"] / phase["seconds"]
        p50, p99 = milliseconds(phase["gaps"]), milliseconds(phase["gaps"], "p99")
        lines.append(f"| {phase['name']} | {p50} | {p99} | {ratio:.2f} | {rate:.0f} |")
    lines += ["", f"Goal of the ratio {target.goal}, gate {target.gate}.", ""]
    lines += [
        "| prompt tokens | eager, ms | miss, ms | hit, ms | graph ready after the miss came, ms: p50 (largest) |",
        "|---|---|---|---|---|",
    ]
    for row in result["results"]["misses"]:
        cells = [milliseconds(row[name]) for name in ("eager", "miss", "hit")]
        ready = f"{milliseconds(row['ready_after'])} ({milliseconds(row['ready_after'], 'maximum')})"
        lines.append(f"| {row['prompt_tokens']} | {' | '.join(cells)} | {ready} |")
    within = goals.CAPTURED_WITHIN
    lines += [
        "",
        f"Goal of a capture {within.goal:g} ms, gate {within.gate:g}.",
        "",
        machine_line(result["environment"]),
    ]
    return "\n".join(lines)


def _p99(phase: dict[str, Any]) -> float:
    return float(phase["gaps"]["summary"]["p99"])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Captures beside steady streams, and the price of a miss.")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens of the streams")
    parser.add_argument("--phase-tokens", type=int, default=150, help="tokens of each stream in each phase")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--miss-lengths", type=numbers, default=(10, 32, 64, 100, 200, 400))
    parser.add_argument("--miss-rounds", type=int, default=11, help="the first of which is not counted")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    if arguments.miss_rounds < 2:
        parser.error("--miss-rounds is at least 2")
    report = Report("interference", arguments)
    loaded = make_loaded(arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
    run(lambda: measure(arguments, report, loaded))
    status = report.finish(arguments.out)
    if report.is_passed:  # without captures or tokens there is nothing to divide by
        say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
