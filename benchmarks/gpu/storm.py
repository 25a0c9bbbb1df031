"""Hours of a bad day in minutes: random requests under a graph budget that forces eviction, with captures that fail.

`python -m benchmarks.gpu.storm --device cuda --config llama2-7b --seconds 600 --clients 32 --out storm.json`. Every request
comes from a pool whose eager result is known; every result is compared with it, also of those that were left half way. Free
memory must stay flat after the first minute, and nothing may end with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import Loaded, make_loaded, random_prompt
from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.report import Report, device_of, dtype_of, make_parser, run_ahead_of, say, summary_of
from benchmarks.gpu.service import Service, make_settings, run, serving
from graphcache import (
    Backend,
    CaptureError,
    EagerBackend,
    Event,
    EventType,
    GraphState,
    GraphStateError,
    UnknownGraphError,
)
from hotgraph_server.batch import StepKey
from hotgraph_server.config import GIB, MIB, GraphSettings
from hotgraph_server.errors import HotgraphError
from hotgraph_server.request import Request, SamplingParams

MAX_SAMPLES = 10_000  # of times to first token that the result keeps
FLAT_BYTES = 64 * MIB
FIRST_SECONDS = 60.0  # in which memory may still move
CPU_GRAPH_BYTES = MIB  # what a graph of the eager backend counts, so that there is something to evict


class FailureInjector:
    """Makes captures of a backend fail at random: some before they begin, some by what no capture survives.

    It stands in front of the backend's own `capture`, whatever that backend is. `can_break`: an operation that breaks a
    capture is put into the work; only where work is really recorded, since the eager backend would run it at each replay.
    """

    def __init__(self, backend: Backend, source: random.Random, *, rate: float, can_break: bool) -> None:
        self.num_raised = 0
        self.num_broken = 0
        self.num_unnoticed = 0  # broken, and yet given out as a capture
        self._capture = backend.capture
        self._source = source
        self._rate = rate
        self._can_break = can_break
        self._is_active = False
        backend.capture = self.capture  # type: ignore[method-assign]  # the cache holds this object and calls it by name

    def activate(self, *, is_active: bool) -> None:
        self._is_active = is_active

    @property
    def num_injected(self) -> int:
        return self.num_raised + self.num_broken

    def capture(self, name: str, work: Callable[[], None]) -> Any:
        """See `Backend.capture`. On the capture thread."""
        if not self._is_active or self._source.random() >= self._rate:
            return self._capture(name, work)
        if not self._can_break or self._source.random() < 0.5:
            self.num_raised += 1
            raise CaptureError("injected: the capture was not allowed")
        self.num_broken += 1

        def broken() -> None:
            work()
            torch.cuda.current_stream().synchronize()  # not permitted while the stream is captured

        captured = self._capture(name, broken)
        self.num_unnoticed += 1
        return captured


@dataclass(slots=True)
class Outcomes:
    """What came of the requests of a storm, by the place of the request in the pool."""

    tokens: list[Counter[tuple[int, ...]]]
    ttft_seconds: list[float] = field(default_factory=list)
    num_finished: int = 0
    num_left: int = 0
    num_steps: int = 0
    num_graph_steps: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def make_pool(service: Service, arguments: argparse.Namespace, source: random.Random) -> list[Request]:
    """Distinct requests: lengths, sampling of every kind, seeds."""
    vocabulary_size = service.engine.info.vocabulary_size
    pool = []
    for index in range(arguments.pool):
        short = source.random() < 0.5
        num_tokens = source.randint(1, min(32, arguments.max_prompt) if short else arguments.max_prompt)
        pool.append(
            service.request(
                random_prompt(num_tokens, vocabulary_size, source),
                source.randint(1, arguments.max_tokens),
                sampling=_sampling(index % 5, source),
            )
        )
    return pool


def _sampling(kind: int, source: random.Random) -> SamplingParams:
    seed = source.getrandbits(64)
    temperature = round(source.uniform(0.5, 1.5), 2)
    match kind:
        case 0 | 1:
            return SamplingParams(temperature=0.0)
        case 2:
            return SamplingParams(temperature=temperature, seed=seed)
        case 3:
            top_k, top_p = source.choice((5, 50, 200)), round(source.uniform(0.7, 1.0), 2)
            return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01, seed=seed)
        case _:
            return SamplingParams(
                temperature=temperature,
                repetition_penalty=1.2,
                presence_penalty=0.4,
                frequency_penalty=0.2,
                seed=seed,
            )


async def storm(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> None:
    """The whole of it; results and checks go into the report."""
    device = loaded.model.device
    is_cuda = device.type == "cuda"
    tokens_each = arguments.max_prompt + arguments.max_tokens
    settings = make_settings(
        loaded,
        num_slots=arguments.slots,
        kv_tokens=arguments.slots * tokens_each,
        graphs=GraphSettings(budget_bytes=4 * GIB, policy=arguments.policy, stall_budget_seconds=1.0),
        prefix_caching=arguments.prefix_caching,
    )
    backend = None if is_cuda else EagerBackend(size_bytes=lambda _: CPU_GRAPH_BYTES)
    source = random.Random(arguments.seed)
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments), backend=backend) as service:
        pool = make_pool(service, arguments, source)
        oracle = Oracle(service)
        begin_seconds = time.perf_counter()
        for request in pool:
            await oracle.expected(request)
        say(f"{len(pool)} requests run eagerly in {time.perf_counter() - begin_seconds:.1f} s")
        injector = FailureInjector(
            service.engine.graphs.backend, random.Random(source.random()), rate=arguments.fail, can_break=is_cuda
        )
        await service.settle()
        service.evict_all()  # also those that the engine would keep for good
        graph_bytes = await _size_of_graphs(service)
        limit_bytes = max(1, arguments.budget_graphs * graph_bytes)
        service.engine.graphs.update_budget(limit_bytes=limit_bytes)
        injector.activate(is_active=True)
        counts: Counter[EventType] = Counter()

        def count(event: Event[StepKey]) -> None:
            counts[event.type] += 1

        service.engine.graphs.add_listener(count)
        before = service.engine.graphs.stats()
        outcomes, memory = await _blow(service, pool, arguments, source, device)
        injector.activate(is_active=False)
        await service.scheduler.wait_idle()
        await service.settle()
        after = service.engine.graphs.stats()
        report.results |= {
            "graph_bytes": graph_bytes,
            "budget_bytes": limit_bytes,
            "num_captures": after.num_captures - before.num_captures,
            "num_evictions": after.num_evictions - before.num_evictions,
            "num_failures": after.num_failures - before.num_failures,
            "num_quarantined": counts[EventType.QUARANTINED],
            "num_injected": injector.num_injected,
            "num_injected_breaks": injector.num_broken,
            "num_finished": outcomes.num_finished,
            "num_left": outcomes.num_left,
            "num_steps_of_requests": outcomes.num_steps,
            "num_graph_steps_of_requests": outcomes.num_graph_steps,
            "errors": dict(outcomes.errors),
            "ttft": summary_of(outcomes.ttft_seconds, max_kept=MAX_SAMPLES),
            "memory": memory,
        }
        _check_counts(report, injector)
        _check_memory(report, memory, is_cuda=is_cuda, seconds=arguments.seconds)
        await _check_tokens(report, oracle, pool, outcomes)


async def _size_of_graphs(service: Service) -> int:
    """Bytes of a graph: the median of a few of different kinds."""
    keys = [service.decode_key(1), service.decode_key(4), service.prompt_key(16), service.prompt_key(64)]
    infos = [info for info in await service.warm(keys) if info.state is GraphState.READY]
    if not infos:
        raise RuntimeError("no graph could be captured, so there is nothing to storm")
    return sorted(info.size_bytes for info in infos)[len(infos) // 2]


async def _blow(
    service: Service,
    pool: Sequence[Request],
    arguments: argparse.Namespace,
    source: random.Random,
    device: torch.device,
) -> tuple[Outcomes, list[tuple[float, int]]]:
    """Runs the clients until the time is over; memory samples are (seconds since the start, bytes)."""
    outcomes = Outcomes([Counter() for _ in pool])
    memory: list[tuple[float, int]] = []
    begin_seconds = time.monotonic()
    end_seconds = begin_seconds + arguments.seconds

    async def client(index: int) -> None:
        mine = random.Random(f"{arguments.seed}-{index}")
        while time.monotonic() < end_seconds:
            if mine.random() < 0.3:
                await asyncio.sleep(mine.uniform(0.0, 0.05))
            await _one(service, pool, outcomes, mine, arguments.leave)

    async def evict_now_and_then() -> None:
        while time.monotonic() < end_seconds:
            await asyncio.sleep(source.uniform(0.05, 0.5))
            ready = service.engine.graphs.list([GraphState.READY])
            if ready:
                _evict(service, source.choice(ready).name)

    async def watch_memory() -> None:
        while time.monotonic() < end_seconds:
            memory.append((time.monotonic() - begin_seconds, _memory_bytes(device)))
            await asyncio.sleep(min(arguments.memory_seconds, max(0.05, end_seconds - time.monotonic())))

    async def tell() -> None:
        while time.monotonic() < end_seconds:
            await asyncio.sleep(min(30.0, max(0.05, end_seconds - time.monotonic())))
            stats = service.engine.graphs.stats()
            say(
                f"{time.monotonic() - begin_seconds:.0f} s: {outcomes.num_finished} finished, {outcomes.num_left} left, "
                f"{stats.num_captures} captures, {stats.num_evictions} evictions, {sum(outcomes.errors.values())} errors"
            )

    async with asyncio.TaskGroup() as group:
        for index in range(arguments.clients):
            group.create_task(client(index))
        for work in (evict_now_and_then, watch_memory, tell):
            group.create_task(work())
    return outcomes, memory


def _evict(service: Service, name: str) -> None:
    with contextlib.suppress(GraphStateError, UnknownGraphError):  # the budget was quicker
        service.engine.graphs.evict(name)


async def _one(
    service: Service, pool: Sequence[Request], outcomes: Outcomes, source: random.Random, leave_rate: float
) -> None:
    index = source.randrange(len(pool))
    request = dataclasses.replace(pool[index], request_id=f"storm-{source.getrandbits(64):016x}")
    max_events = source.randint(1, 8) if source.random() < leave_rate else None
    try:
        completion = await service.complete(request, max_events=max_events)
    except HotgraphError as error:
        outcomes.errors[f"{type(error).__name__}: {error.message}"] += 1
        return
    outcomes.tokens[index][tuple(completion.token_ids)] += 1
    outcomes.ttft_seconds.append(completion.ttft_seconds)
    if completion.receipt is None:
        outcomes.num_left += 1
        return
    outcomes.num_finished += 1
    outcomes.num_steps += completion.receipt.num_steps
    outcomes.num_graph_steps += completion.receipt.num_graph_steps
    if len(completion.token_ids) != request.max_tokens:
        outcomes.errors["a request ended early"] += 1


def _memory_bytes(device: torch.device) -> int:
    """Free memory of the device; on the CPU what this process holds."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _check_counts(report: Report, injector: FailureInjector) -> None:
    results = report.results
    report.check("graphs were captured", is_passed=results["num_captures"] > 0)
    report.check("graphs were evicted", is_passed=results["num_evictions"] > 0)
    report.check("requests were replayed", is_passed=results["num_graph_steps_of_requests"] > 0)
    report.check("requests finished", is_passed=results["num_finished"] > 0)
    report.check("captures were made to fail", is_passed=injector.num_injected > 0)
    report.check(
        "every broken capture was noticed", is_passed=injector.num_unnoticed == 0, detail=str(injector.num_unnoticed)
    )
    quarantined = results["num_quarantined"]
    report.check("no graph was quarantined", is_passed=quarantined == 0, detail=f"{quarantined} were")
    report.check("no request ended with an error", is_passed=not results["errors"], detail=str(results["errors"]))


def _check_memory(report: Report, memory: Sequence[tuple[float, int]], *, is_cuda: bool, seconds: float) -> None:
    """Flat after the first minute; of a run shorter than two, after its first half. Only where the device tells."""
    begin = min(FIRST_SECONDS, seconds / 2)
    late = [num_bytes for moment, num_bytes in memory if moment >= begin]
    spread = max(late) - min(late) if late else 0
    report.results["memory_spread_bytes"] = spread
    if is_cuda:
        is_flat = len(late) > 1 and spread <= FLAT_BYTES
        report.check("free memory is flat", is_passed=is_flat, detail=f"{spread / MIB:.1f} MiB, {len(late)} samples")


async def _check_tokens(report: Report, oracle: Oracle, pool: Sequence[Request], outcomes: Outcomes) -> None:
    num_compared = num_ties = num_distinct = 0
    wrong: list[str] = []
    for request, found in zip(pool, outcomes.tokens, strict=True):
        for token_ids, times in found.items():
            verdict = await oracle.check(request, token_ids)
            num_distinct += 1
            num_compared += times
            num_ties += verdict.num_ties
            if verdict.mismatch is not None:
                wrong.append(f"{request.sampling}: {verdict.mismatch}")
    report.results |= {
        "num_compared": num_compared,
        "num_distinct_outcomes": num_distinct,
        "num_ties": num_ties,
        "num_oracle_runs": oracle.num_runs,
        "mismatches": wrong,
    }
    report.check(
        "every result is the eager one", is_passed=num_compared > 0 and not wrong, detail=f"{len(wrong)}: {wrong[:3]}"
    )


def summary(result: dict[str, Any]) -> str:
    """The run in a few lines."""
    found = result["results"]
    return "\n".join(
        [
            f"{found['num_finished']} requests finished, {found['num_left']} were left, {len(found['errors'])} kinds of error",
            f"{found['num_captures']} captures, {found['num_evictions']} evictions, {found['num_injected']} failures injected",
            f"{found['num_graph_steps_of_requests']} of {found['num_steps_of_requests']} steps were replays",
            f"{found['num_compared']} results compared ({found['num_distinct_outcomes']} distinct, "
            f"{found['num_ties']} ties between level tokens), {len(found['mismatches'])} wrong",
            f"memory after the first minute within {found['memory_spread_bytes'] / MIB:.1f} MiB",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("A storm of random requests, evictions and failing captures.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--pool", type=int, default=96, help="distinct requests")
    parser.add_argument("--max-prompt", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--budget-graphs", type=int, default=12, help="graphs of the median size that the budget holds")
    parser.add_argument("--policy", choices=("value", "lru", "lfu"), default="lru", help="lru evicts most")
    parser.add_argument("--fail", type=float, default=0.15, help="share of captures made to fail")
    parser.add_argument("--leave", type=float, default=0.15, help="share of requests that are left half way")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--memory-seconds", type=float, default=5.0, help="between two looks at the memory")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("storm", arguments)
    loaded = make_loaded(arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
    log = logging.getLogger("graphcache")
    level = log.level
    log.setLevel(logging.ERROR)  # every capture that is made to fail would be a warning
    try:
        run(lambda: storm(arguments, report, loaded))
    finally:
        log.setLevel(level)
    say(summary(report.to_dict()))
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
