"""Latency of a lone request and of steady batches, in process and through the daemon over gRPC on a Unix socket.

`python -m benchmarks.gpu.latency --device cuda --config llama2-7b --grpc --out latency.json`. Graphs are warm, prompts are
fresh and random, and lone requests keep a distance from each other: back to back a GPU runs into its power limit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import goals
from benchmarks.gpu.daemon_child import daemon_process
from benchmarks.gpu.floor import latency_tables, measure_rates
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
from benchmarks.gpu.service import WARM_SECONDS, Completion, Service, failures, make_settings, run, serving
from benchmarks.gpu.streams import Clients, clients, stream
from graphcache import SystemClock
from hotgraph_client import Client, GraphKey, Receipt, SamplerVariant
from hotgraph_server.awake_cores import AwakeCores, choose_cores
from hotgraph_server.engine.engine import gpu_address

NUM_CHECKED_TOKENS = 8
WARM_UPS = 3
MIN_AWAKE_CORES = 8  # of a machine, from which on a caller may have one of them awake beside the daemon's
EAGER_SHARE = 0.1  # of the steps of a batch, while its streams join


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `measure` reads."""
    parser.add_argument("--lengths", type=numbers, default=(10, 32, 64, 100, 200, 300, 400, 500))
    parser.add_argument("--samples", type=int, default=100, help="lone requests of each length")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--batch-prompt", type=int, default=192, help="prompt tokens of the steady streams")
    parser.add_argument(
        "--batch-tokens", type=int, default=128, help="tokens of each: contexts are about 256 at the middle"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each batch")


def kv_tokens(arguments: argparse.Namespace) -> int:
    """What the largest batch holds, and the longest lone prompt."""
    longest = max(arguments.lengths, default=0) + NUM_CHECKED_TOKENS
    in_batches = max(arguments.batches, default=1) * (arguments.batch_prompt + arguments.batch_tokens)
    return int(max(in_batches, 2 * longest))


def num_slots(arguments: argparse.Namespace) -> int:
    batches: tuple[int, ...] = arguments.batches
    return max((8, *batches))


# In process.


async def measure(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> dict[str, Any]:
    """TTFT and TPOT of engine and scheduler in this process, with their checks."""
    settings = make_settings(loaded, num_slots=num_slots(arguments), kv_tokens=kv_tokens(arguments))
    source = random.Random(arguments.seed)
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        keys = [service.prompt_key(length) for length in arguments.lengths]
        keys += [service.decode_key(batch) for batch in (1, *arguments.batches)]
        infos = await service.warm(keys)
        report.check("every graph asked for was captured", is_passed=not failures(infos), detail=failures(infos))
        await service.settle()  # the engine's own
        ttft = {str(length): await _lone(service, arguments, report, length, source) for length in arguments.lengths}
        tpot = {str(batch): await _steady(service, arguments, report, batch, source) for batch in arguments.batches}
        return {"ttft": ttft, "tpot": tpot, "graphs": [str(info.name) for info in infos]}


async def _lone(
    service: Service, arguments: argparse.Namespace, report: Report, length: int, source: random.Random
) -> dict[str, Any]:
    vocabulary_size = service.engine.info.vocabulary_size
    samples: list[float] = []
    steps: list[float] = []
    num_eager = 0
    for index in range(WARM_UPS + arguments.samples):
        await asyncio.sleep(arguments.gap_ms / 1e3)
        completion = await service.complete(service.request(random_prompt(length, vocabulary_size, source), 1))
        if index >= WARM_UPS:
            assert completion.receipt is not None
            samples.append(completion.ttft_seconds)
            steps += [group.engine_seconds for group in completion.receipt.step_groups]
            num_eager += not completion.is_all_graphs
    report.check(f"prompts of {length} were replayed", is_passed=num_eager == 0, detail=f"{num_eager} ran eagerly")
    request = service.request(random_prompt(length, vocabulary_size, source), NUM_CHECKED_TOKENS)
    verdict = await Oracle(service).check(request, (await service.complete(request)).token_ids)
    report.check(
        f"tokens after {length} are the eager ones", is_passed=verdict.mismatch is None, detail=verdict.mismatch or ""
    )
    found = {**summary_of(samples), "steps": summary_of(steps)}
    say(f"in process, TTFT at {length}: p50 {milliseconds(found)} ms, p99 {milliseconds(found, 'p99')} ms")
    return found


async def _steady(
    service: Service, arguments: argparse.Namespace, report: Report, batch: int, source: random.Random
) -> dict[str, Any]:
    """Time per token of each stream, and the gaps between tokens, while all streams of the batch decode."""
    vocabulary_size = service.engine.info.vocabulary_size
    per_stream: list[float] = []
    gaps: list[float] = []
    num_steps = num_eager = 0
    for index in range(1 + arguments.rounds):
        if index == 1:
            await service.settle()  # what the first round asked for on the way to the steady state
        requests = [
            service.request(random_prompt(arguments.batch_prompt, vocabulary_size, source), arguments.batch_tokens)
            for _ in range(batch)
        ]
        completions = await asyncio.gather(*map(service.complete, requests))
        if index == 0:
            continue
        if index == 1:
            verdict = await Oracle(service).check(requests[0], completions[0].token_ids[:NUM_CHECKED_TOKENS])
            report.check(
                f"tokens in a batch of {batch} are the eager ones",
                is_passed=verdict.mismatch is None,
                detail=verdict.mismatch or "",
            )
        round_per_stream, round_gaps = steady_part([completion.token_seconds for completion in completions])
        per_stream += round_per_stream
        gaps += round_gaps
        receipts = [completion.receipt for completion in completions if completion.receipt is not None]
        num_steps += sum(receipt.num_steps for receipt in receipts)
        num_eager += sum(receipt.num_eager_steps for receipt in receipts)
    report.check(f"a batch of {batch} was steady", is_passed=bool(per_stream), detail="no time at which all decoded")
    share = num_eager / max(1, num_steps)
    report.check(f"a batch of {batch} was replayed", is_passed=share <= EAGER_SHARE, detail=f"{share:.1%} ran eagerly")
    found = {"tpot": summary_of(per_stream), "gaps": summary_of(gaps)}
    say(f"in process, TPOT at batch {batch}: {milliseconds(found['tpot'])} ms")
    return found


def steady_part(token_seconds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """(time per token of each stream, gaps of all) from when the last stream has its first token to when one ends."""
    begin = max(times[0] for times in token_seconds)
    end = min(times[-1] for times in token_seconds)
    per_stream: list[float] = []
    gaps: list[float] = []
    for times in token_seconds:
        inside = [moment for moment in times if begin <= moment <= end]
        if len(inside) > 1:
            per_stream.append((inside[-1] - inside[0]) / (len(inside) - 1))
            gaps += [later - earlier for earlier, later in itertools.pairwise(inside)]
    return per_stream, gaps


# Through the daemon.


def measure_grpc(arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    """The same by the client's clock, with the daemon in a process of its own."""
    with daemon_process(arguments, num_slots=num_slots(arguments), kv_tokens=kv_tokens(arguments)) as target:
        return measure_target(arguments, report, target)


def measure_target(arguments: argparse.Namespace, report: Report, target: str) -> dict[str, Any]:
    """The same at a daemon that serves already.

    `ttft` is of a caller whose core sleeps between requests, as it does by itself; `ttft_awake` of one that keeps his awake.
    """
    source = random.Random(arguments.seed + 1)
    with Client(target) as client:
        vocabulary_size = client.get_model().vocabulary_size
        num_missing = _warm_prompts(client, arguments, vocabulary_size, source)
        report.check("the daemon's graphs were captured", is_passed=num_missing == 0, detail=f"{num_missing} were not")
        found = {"ttft": _lone_over_grpc(client, arguments, report, vocabulary_size, source)}
        with _awake_caller() as cores:
            if cores:
                say(f"the caller on cores {cores}, which stay awake")
                found["ttft_awake"] = _lone_over_grpc(client, arguments, report, vocabulary_size, source)
        with clients(target, max(arguments.batches)) as streams:  # only now: so many processes are not quite still
            found["tpot"] = _steady_over_grpc(client, streams, arguments, vocabulary_size, source)
    return found


@contextlib.contextmanager
def _awake_caller() -> Iterator[tuple[int, ...]]:
    """This process keeps to two cores of its own, which stay awake, if there are enough beside the daemon's."""
    num_cores = len(os.sched_getaffinity(0))
    address = gpu_address(torch.device("cuda:0")) if torch.cuda.is_available() else None
    daemons = choose_cores(None, gpu_address=address)
    cores = AwakeCores(
        choose_cores(2, gpu_address=address, taken=daemons) if num_cores > MIN_AWAKE_CORES else (),
        quiet_seconds=math.inf,
        clock=SystemClock(),
    )
    cores.start()
    try:
        yield cores.cores
    finally:
        cores.close()


def _lone_over_grpc(
    client: Client, arguments: argparse.Namespace, report: Report, vocabulary_size: int, source: random.Random
) -> dict[str, Any]:
    """TTFT by length."""
    ttft: dict[str, Any] = {}
    for length in arguments.lengths:
        samples: list[float] = []
        steps: list[float] = []
        num_eager = 0
        for index in range(WARM_UPS + arguments.samples):
            time.sleep(arguments.gap_ms / 1e3)
            completion, receipt = _generate(client, random_prompt(length, vocabulary_size, source), 1)
            if index >= WARM_UPS:
                samples.append(completion.ttft_seconds)
                steps += [group.engine_seconds for group in receipt.step_groups]
                num_eager += receipt.num_eager_steps > 0
        report.check(
            f"the daemon replayed prompts of {length}", is_passed=num_eager == 0, detail=f"{num_eager} ran eagerly"
        )
        ttft[str(length)] = found = {**summary_of(samples), "steps": summary_of(steps)}
        say(f"over gRPC, TTFT at {length}: p50 {milliseconds(found)} ms, p99 {milliseconds(found, 'p99')} ms")
    return ttft


def _steady_over_grpc(
    client: Client, streams: Clients, arguments: argparse.Namespace, vocabulary_size: int, source: random.Random
) -> dict[str, Any]:
    """TPOT and gaps by batch."""
    for batch in arguments.batches:
        _together(streams, arguments, batch, vocabulary_size, source)
    _await_captures(client, [GraphKey(batch, batch, SamplerVariant.GREEDY) for batch in arguments.batches])
    tpot: dict[str, Any] = {}
    for batch in arguments.batches:
        per_stream: list[float] = []
        gaps: list[float] = []
        for index in range(1 + arguments.rounds):
            times = _together(streams, arguments, batch, vocabulary_size, source)
            if index:
                round_per_stream, round_gaps = steady_part(times)
                per_stream += round_per_stream
                gaps += round_gaps
        tpot[str(batch)] = {"tpot": summary_of(per_stream), "gaps": summary_of(gaps)}
        say(f"over gRPC, TPOT at batch {batch}: {milliseconds(tpot[str(batch)]['tpot'])} ms")
    return tpot


def _generate(client: Client, prompt: Sequence[int], max_tokens: int) -> tuple[Completion, Receipt]:
    """One streamed request; its receipt is the client's own type."""
    begin_seconds, token_seconds, token_ids, receipt = stream(client, prompt, max_tokens)
    return Completion(begin_seconds, token_ids=token_ids, token_seconds=token_seconds), receipt


def _warm_prompts(client: Client, arguments: argparse.Namespace, vocabulary_size: int, source: random.Random) -> int:
    """Asks for the graphs by sending what needs them, then waits; returns how many requests still ran eagerly."""
    for length in arguments.lengths:
        _generate(client, random_prompt(length, vocabulary_size, source), 2)
    _await_captures(client, [])
    num_eager = 0
    for length in arguments.lengths:
        _, receipt = _generate(client, random_prompt(length, vocabulary_size, source), 2)
        num_eager += receipt.num_eager_steps > 0
    return num_eager


def _await_captures(client: Client, keys: Sequence[GraphKey]) -> None:
    """Asks for these besides, and waits until none is pending."""
    if keys:
        client.prewarm_graphs(keys, wait_seconds=60.0)
    deadline = time.monotonic() + WARM_SECONDS
    while client.list_graphs(["queued", "capturing"]) and time.monotonic() < deadline:
        time.sleep(0.05)


def _together(
    streams: Clients, arguments: argparse.Namespace, batch: int, vocabulary_size: int, source: random.Random
) -> list[list[float]]:
    """Times of the tokens of so many streams at once."""
    prompts = [random_prompt(arguments.batch_prompt, vocabulary_size, source) for _ in range(batch)]
    return streams.token_seconds(prompts, arguments.batch_tokens)


# Tables.


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result, beside vLLM's figures and the goals where they are for this model.

    What share of the floor each cell is tells `floor.latency_tables`.
    """
    results, config = result["results"], result["settings"]["config"]
    levels = [(name, results[name]) for name in ("in process", "gRPC") if name in results]
    names = [name for name, _ in levels]
    is_7b = config == goals.CONFIG and result["settings"]["device"] == "cuda"
    extra = ["vLLM 0.26", "goal", "gate"] if is_7b else []
    share = ["gRPC share"] if len(levels) > 1 else []
    lines = ["TTFT of a lone request, ms: p50 (p99)", ""]
    awake = results.get("gRPC", {}).get("ttft_awake")
    lines += _head(["prompt tokens", *names, *share, *(["gRPC, caller awake", "share"] if awake else []), *extra])
    for length in result["settings"]["lengths"]:
        parts = [found["ttft"][str(length)] for _, found in levels]
        cells = [f"{milliseconds(part)} ({milliseconds(part, 'p99')})" for part in parts]
        cells += [_difference(parts)] if share else []
        if awake:
            part = awake[str(length)]
            cells += [f"{milliseconds(part)} ({milliseconds(part, 'p99')})"]
            cells += [_difference([parts[0], part]) if share else ""]
        cells += [_figure(goals.VLLM_TTFT.get(length)), *_target(goals.TTFT.get(length))] if is_7b else []
        lines.append(_row([str(length), *cells]))
    lines += ["", "Time per output token, ms: p50 of streams (p99 of the gaps between tokens)", ""]
    lines += _head(["batch", *names, *extra])
    for batch in result["settings"]["batches"]:
        parts = [found["tpot"][str(batch)] for _, found in levels]
        cells = [f"{milliseconds(part['tpot'])} ({milliseconds(part['gaps'], 'p99')})" for part in parts]
        cells += [_figure(goals.VLLM_TPOT.get(batch)), *_target(goals.TPOT.get(batch))] if is_7b else []
        lines.append(_row([str(batch), *cells]))
    lines += ["", machine_line(result["environment"])]
    if is_7b:
        lines += ["", f"Figures of vLLM, goals and gates: {goals.SOURCE}."]
    return "\n".join(lines)


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _difference(parts: Sequence[dict[str, Any]]) -> str:
    """What the daemon and its transport add: the client's p50 less the one in process."""
    inside, outside = (part["summary"]["p50"] for part in parts)
    return f"{(outside - inside) * 1e3:.2f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _target(target: goals.Target | None) -> list[str]:
    return ["", ""] if target is None else [f"{target.goal:g}", f"{target.gate:g}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Latency: TTFT of a lone request, TPOT of steady batches.")
    add_arguments(parser)
    parser.add_argument("--grpc", action="store_true", help="also through the daemon, over a Unix socket")
    parser.add_argument("--batch-invariant", action="store_true", help="results do not depend on what else runs")
    parser.add_argument("--only-grpc", action="store_true", help="only that")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("latency", arguments)
    report.results["rates"] = measure_rates(device_of(arguments), dtype_of(arguments))
    if not arguments.only_grpc:
        loaded = make_loaded(
            arguments.config,
            device=device_of(arguments),
            dtype=dtype_of(arguments),
            batch_invariant=arguments.batch_invariant,
        )
        report.results["model_seconds"] = loaded.load_seconds
        say(f"{loaded.model_id}: {loaded.model.weights_bytes / 1e9:.2f} GB made in {loaded.load_seconds:.1f} s")
        report.results["in process"] = run(lambda: measure(arguments, report, loaded))
        del loaded
    if arguments.grpc or arguments.only_grpc:
        report.results["gRPC"] = measure_grpc(arguments, report)
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    say(latency_tables(report.to_dict(), report.results["rates"]))
    return status


if __name__ == "__main__":
    sys.exit(main())
