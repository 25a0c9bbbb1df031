"""The paper's tables about graphs: which lengths can be captured, the rolling cache, and how many lengths to cover."""

from __future__ import annotations

import bisect
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.report import milliseconds, say, summary_of
from benchmarks.gpu.service import Service, failures, make_settings, serving
from benchmarks.paper.bench import Bench
from benchmarks.paper.length_graphs import LengthGraphs
from benchmarks.paper.modes import TransformersEager, serving_lone
from benchmarks.paper.tables import Cell, Table
from graphcache import EagerBackend, GraphState
from hotgraph_server.config import GIB, MIB, GraphSettings
from hotgraph_server.engine.buckets import TOKEN_SIZES

CPU_GRAPH_BYTES = MIB  # what a graph of the eager backend counts, so that a budget has a meaning there
CAPTURE_ERRORS = (RuntimeError, torch.OutOfMemoryError)


async def captures(bench: Bench) -> None:
    """Capture success over all lengths: the paper's method, a graph a length, against our ladder."""
    arguments = bench.arguments
    lengths = range(1, arguments.longest + 1, arguments.stride)
    graphs = LengthGraphs(bench.transformers(), capacity=1)
    judge = TransformersEager(bench.transformers())
    num_captured = num_right = 0
    failed: dict[int, str] = {}
    for length in lengths:
        prompt = bench.prompt(length, 0)
        try:
            token_id = graphs.next_token(prompt)
        except CAPTURE_ERRORS as error:
            failed[length] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        num_captured += 1
        num_right += judge.is_likeliest(prompt, token_id)
    graphs.clear()
    seconds = sum(graphs.capture_seconds)
    say(f"a graph a length: {num_captured} of {len(lengths)} captured in {seconds:.1f} s")
    ours = await _our_captures(bench, lengths)
    bench.report.results["captures"] = {
        "lengths": list(lengths),
        "per_length": {"failed": failed, "num_right": num_right, "capture_seconds": graphs.capture_seconds},
        "hotgraph": ours,
    }
    bench.report.check(
        "graphs by length give transformers' tokens",
        is_passed=num_right == num_captured,
        detail=f"{num_right} of {num_captured}",
    )
    num_ours_right = len(lengths) - len(ours["wrong"])
    bench.add_table(
        Table(
            "captures",
            f"Capture over the lengths 1 to {arguments.longest}",
            ("method", "lengths", "served by a graph", "right tokens", "graphs", "seconds to capture them"),
            [
                ["a graph a length", len(lengths), num_captured, num_right, num_captured, seconds],
                ["hotgraph", len(lengths), ours["num_served"], num_ours_right, ours["num_graphs"], ours["seconds"]],
            ],
            "" if graphs.is_captured else "no CUDA here: the forward was kept, not captured",
        )
    )


async def _our_captures(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    async with serving_lone(bench) as service:
        begin_seconds = time.perf_counter()
        infos = await service.warm([service.prompt_key(length) for length in lengths])
        seconds = time.perf_counter() - begin_seconds
        oracle = Oracle(service)
        num_served = 0
        wrong: dict[int, str] = {}
        for length in lengths:
            request = service.request(bench.prompt(length, 0), 1)
            completion = await service.complete(request)
            num_served += completion.is_all_graphs
            verdict = await oracle.check(request, completion.token_ids)
            if verdict.mismatch is not None:
                wrong[length] = verdict.mismatch
        is_served = num_served == len(lengths)
        bench.report.check("every length is served by a graph", is_passed=is_served, detail=failures(infos))
        bench.report.check("every length gives the eager token", is_passed=not wrong, detail=str(wrong))
        say(
            f"hotgraph: {num_served} of {len(lengths)} lengths served by {len(infos)} graphs, captured in {seconds:.2f} s"
        )
        return {
            "num_served": num_served,
            "num_graphs": len(infos),
            "wrong": wrong,
            "seconds": seconds,
            "record_seconds": [info.capture.record_seconds for info in infos if info.capture is not None],
            "used_bytes": service.engine.graphs.budget().used_bytes,
        }


async def rolling(bench: Bench) -> None:
    """The same walk over lengths through both caches: graphs created, evicted, resident, and their bytes."""
    arguments = bench.arguments
    walk = [*range(1, arguments.longest + 1, arguments.stride)]
    walk += random.Random(arguments.seed).choices(range(1, arguments.longest + 1), k=arguments.walk)
    graphs = LengthGraphs(bench.transformers(), capacity=arguments.capacity)
    theirs: list[float] = []
    for index, length in enumerate(walk):
        prompt = bench.prompt(length, index)
        begin_seconds = time.perf_counter()
        graphs.next_token(prompt)
        theirs.append(time.perf_counter() - begin_seconds)
    their_row: list[Cell] = ["a graph a length", graphs.num_created, graphs.num_evicted, len(graphs.lengths)]
    their_row += [graphs.num_bytes / MIB, milliseconds(summary_of(theirs)), milliseconds(summary_of(theirs), "p99")]
    graphs.clear()
    bench.free()
    backend = None if bench.device.type == "cuda" else EagerBackend(size_bytes=lambda _: CPU_GRAPH_BYTES)
    settings = make_settings(
        bench.loaded(), num_slots=8, kv_tokens=4096, graphs=GraphSettings(budget_bytes=4 * GIB, policy="lru")
    )
    async with serving(bench.loaded(), settings, run_ahead=bench.run_ahead, backend=backend) as service:
        ours, stats = await _walk(service, bench, walk)
    our_row: list[Cell] = ["hotgraph", stats["num_captures"], stats["num_evictions"], stats["num_ready"]]
    our_row += [stats["used_bytes"] / MIB, milliseconds(summary_of(ours)), milliseconds(summary_of(ours), "p99")]
    bench.report.results["rolling"] = {
        "walk": walk,
        "per_length": summary_of(theirs),
        "hotgraph": summary_of(ours),
        **stats,
    }
    bench.report.check("the budget held", is_passed=stats["used_bytes"] <= stats["limit_bytes"], detail=str(stats))
    bench.add_table(
        Table(
            "rolling",
            f"Rolling caches over a walk of {len(walk)} prompts",
            ("method", "created", "evicted", "resident", "MiB", "TTFT p50, ms", "TTFT p99, ms"),
            [their_row, our_row],
            f"room for {arguments.capacity} graphs of one length each, and for {arguments.budget_graphs} of ours",
        )
    )


async def _walk(service: Service, bench: Bench, walk: Sequence[int]) -> tuple[list[float], dict[str, int]]:
    """TTFT of each prompt, and the cache's counts, under a budget of so many graphs of the middle size."""
    infos = await service.warm([service.prompt_key(length) for length in (16, 64, 256)])
    sizes = sorted(info.size_bytes for info in infos if info.state is GraphState.READY)
    await service.settle()
    service.evict_all()
    before = service.engine.graphs.stats()
    service.engine.graphs.update_budget(limit_bytes=max(1, bench.arguments.budget_graphs * sizes[len(sizes) // 2]))
    samples = []
    for index, length in enumerate(walk):
        completion = await service.complete(service.request(bench.prompt(length, index), 1))
        samples.append(completion.ttft_seconds)
    await service.settle()
    stats = service.engine.graphs.stats()
    return samples, {
        "num_captures": stats.num_captures - before.num_captures,
        "num_evictions": stats.num_evictions - before.num_evictions,
        "num_ready": stats.num_ready,
        "used_bytes": stats.used_bytes,
        "limit_bytes": stats.limit_bytes,
    }


def strategies(longest: int) -> dict[str, list[int]]:
    """Which lengths have a graph, up to the first that holds the longest prompt."""
    powers = [1 << exponent for exponent in range(longest.bit_length() + 1)]
    ladder = list(TOKEN_SIZES) + ([longest] if longest > TOKEN_SIZES[-1] else [])
    found = {
        "every length": list(range(1, longest + 1)),
        "every tenth": list(range(10, longest + 10, 10)),
        "powers of two": powers,
        "hotgraph's ladder": ladder,
    }
    return {name: sizes[: bisect.bisect_left(sizes, longest) + 1] for name, sizes in found.items()}


async def coverage(bench: Bench) -> None:
    """The same random prompts under each strategy, by the paper's method with padding; and by our engine on its ladder."""
    arguments = bench.arguments
    source = random.Random(arguments.seed)
    lengths = [source.randint(1, arguments.longest) for _ in range(arguments.walk)]
    rows: list[list[Cell]] = []
    found: dict[str, Any] = {}
    for name, sizes in strategies(arguments.longest).items():
        found[name] = _cover(bench, name, sizes[:: arguments.stride] if name == "every length" else sizes, lengths)
        rows.append(_coverage_row(name, found[name]))
    async with serving_lone(bench) as service:
        keys = [service.prompt_key(length) for length in range(1, arguments.longest + 1)]
        await service.settle()
        begin_seconds = time.perf_counter()
        infos = await service.warm(keys)
        seconds = time.perf_counter() - begin_seconds
        bench.report.check("our ladder was captured", is_passed=not failures(infos), detail=failures(infos))
        samples = []
        for index, length in enumerate(lengths):
            completion = await service.complete(service.request(bench.prompt(length, index), 1))
            samples.append(completion.ttft_seconds)
        found["hotgraph"] = {
            "num_graphs": len(infos),
            "num_bytes": service.engine.graphs.budget().used_bytes,
            "capture_seconds": seconds,
            "failure": "",
            "ttft": summary_of(samples),
        }
        rows.append(_coverage_row("hotgraph's engine on its ladder", found["hotgraph"]))
    bench.report.results["coverage"] = found
    problems = "; ".join(f"{name}: {part['failure']}" for name, part in found.items() if part["failure"])
    bench.add_table(
        Table(
            "coverage",
            f"Which lengths to capture: {len(lengths)} random prompts of 1 to {arguments.longest} tokens",
            ("strategy", "graphs", "MiB", "seconds to capture", "TTFT p50, ms", "TTFT p99, ms"),
            rows,
            f"the first four by graphs of a transformers forward without KV cache, padded{'; ' * bool(problems)}{problems}",
        )
    )


def _cover(bench: Bench, name: str, sizes: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    graphs = LengthGraphs(bench.transformers(), capacity=len(sizes))
    judge = TransformersEager(bench.transformers())
    failure = ""
    try:
        for size in reversed(sizes):
            graphs.get(size)
    except CAPTURE_ERRORS as error:  # out of memory is a result: this many graphs do not fit
        failure = f"{type(error).__name__} after {graphs.num_created} graphs"
    ready = sorted(graphs.lengths)
    samples = []
    wrong = []
    for index, length in enumerate(lengths):
        place = bisect.bisect_left(ready, length)
        if place == len(ready):
            continue
        prompt = bench.prompt(length, index)
        begin_seconds = time.perf_counter()
        token_id = graphs.next_token(prompt, ready[place])
        samples.append(time.perf_counter() - begin_seconds)
        if index < 8 and not judge.is_likeliest(prompt, token_id):
            wrong.append(length)
    bench.report.check(
        f"{name}: padded graphs give transformers' tokens", is_passed=not wrong, detail=f"not at {wrong}"
    )
    found: dict[str, Any] = {
        "num_graphs": graphs.num_created,
        "num_bytes": graphs.num_bytes,
        "capture_seconds": sum(graphs.capture_seconds),
        "failure": failure,
        "ttft": summary_of(samples),
    }
    say(
        f"{name}: {graphs.num_created} graphs, {graphs.num_bytes / MIB:.0f} MiB, TTFT p50 {milliseconds(found['ttft'])} ms"
    )
    graphs.clear()
    bench.free()
    return found


def _coverage_row(name: str, found: dict[str, Any]) -> list[Cell]:
    part = found["ttft"]
    return [
        name,
        found["num_graphs"],
        found["num_bytes"] / MIB,
        found["capture_seconds"],
        milliseconds(part) or None,
        milliseconds(part, "p99") or None,
    ]
