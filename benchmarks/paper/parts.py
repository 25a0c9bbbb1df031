"""What each part of hotgraph is worth: the ablation, and what the process boundary costs."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from benchmarks.gpu import latency
from benchmarks.gpu.models import Loaded
from benchmarks.gpu.report import milliseconds, say, summary_of
from benchmarks.gpu.service import EAGER, make_settings, run, serving
from benchmarks.paper.bench import Bench
from benchmarks.paper.compare import check_texts, time_first_token
from benchmarks.paper.modes import Hotgraph, Mode, serving_lone, transformers_eager
from benchmarks.paper.tables import Cell, Table
from hotgraph_server.models.bridge import Bridge


@contextlib.asynccontextmanager
async def _without_run_ahead(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench, run_ahead=0) as service:
        yield Hotgraph(service, None)


@contextlib.asynccontextmanager
async def _without_graphs(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench) as service:
        yield Hotgraph(service, EAGER)


@contextlib.asynccontextmanager
async def _without_both(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench, run_ahead=0) as service:
        yield Hotgraph(service, EAGER)


@contextlib.asynccontextmanager
async def _without_kernels(bench: Bench) -> AsyncIterator[Mode]:
    """transformers' forward in our engine, with its paged cache, without graphs: of our decoder only the rest is there."""
    implementation = bench.transformers().config._attn_implementation
    model = Bridge(bench.transformers(), max_context=None)
    loaded = Loaded(model, "bridge", 0.0)
    try:
        async with serving(
            loaded, make_settings(loaded, num_slots=8, kv_tokens=4096), run_ahead=bench.run_ahead
        ) as service:
            yield Hotgraph(service, EAGER)
    finally:
        bench.transformers().set_attn_implementation(implementation)


@contextlib.asynccontextmanager
async def _whole(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench) as service:
        yield Hotgraph(service, None)


VARIANTS: dict[str, Callable[[Bench], AbstractAsyncContextManager[Mode]]] = {
    "hotgraph": _whole,
    "without run-ahead": _without_run_ahead,
    "without graphs": _without_graphs,
    "without graphs and run-ahead": _without_both,
    "without graphs and our decoder": _without_kernels,
    "transformers eager": transformers_eager,
}


async def ablation(bench: Bench) -> None:
    """TTFT and time per token of a lone request as parts are taken away."""
    arguments = bench.arguments
    found: dict[str, Any] = {}
    texts: dict[str, list[int]] = {}
    for name, variant in VARIANTS.items():
        async with variant(bench) as mode:
            await mode.prepare([arguments.ablation_prompt])
            prompts = [bench.prompt(arguments.ablation_prompt, index) for index in range(arguments.p99_iterations)]
            first, _ = await time_first_token(bench, mode, prompts)
            per_token = []
            for index in range(1 + arguments.repeats):
                tokens, times = await mode.generate(
                    bench.prompt(arguments.ablation_prompt, index), arguments.ablation_tokens
                )
                texts.setdefault(name, tokens)
                if index:
                    per_token.append((times[-1] - times[0]) / (len(times) - 1))
            found[name] = {"ttft": summary_of(first), "tpot": summary_of(per_token)}
            say(f"{name}: TTFT {milliseconds(found[name]['ttft'])} ms, TPOT {milliseconds(found[name]['tpot'])} ms")
    bench.report.results["ablation"] = found
    check_texts(bench, bench.prompt(arguments.ablation_prompt, 0), texts)
    whole_ttft, whole_tpot = (found["hotgraph"][part]["summary"]["p50"] for part in ("ttft", "tpot"))
    rows: list[list[Cell]] = []
    for name, parts in found.items():
        ttft, tpot = parts["ttft"]["summary"]["p50"], parts["tpot"]["summary"]["p50"]
        p99 = parts["ttft"]["summary"]["p99"]
        rows.append([name, ttft * 1e3, p99 * 1e3, ttft / whole_ttft, tpot * 1e3, tpot / whole_tpot])
    bench.add_table(
        Table(
            "ablation",
            f"What each part is worth: a lone request, {arguments.ablation_prompt} prompt tokens",
            ("variant", "TTFT p50, ms", "TTFT p99, ms", "over hotgraph", "TPOT, ms", "over hotgraph "),
            rows,
        )
    )


def ipc(bench: Bench) -> None:
    """The same engine in this process and behind the daemon's gRPC on a Unix socket. It has event loops of its own."""
    arguments = bench.arguments
    asked = argparse.Namespace(**vars(arguments))
    asked.samples, asked.batches = arguments.p99_iterations, (1,)
    asked.batch_prompt, asked.batch_tokens, asked.rounds = (
        arguments.ablation_prompt,
        arguments.ablation_tokens,
        arguments.repeats,
    )
    inside = run(lambda: latency.measure(asked, bench.report, bench.loaded()))
    bench.drop_models()  # the daemon has its own
    outside = latency.measure_grpc(asked, bench.report)
    bench.report.results["ipc"] = {"in process": inside, "gRPC": outside}
    rows: list[list[Cell]] = []
    for length in asked.lengths:
        values = [level["ttft"][str(length)]["summary"] for level in (inside, outside)]
        p50, p99 = ([value[part] * 1e3 for value in values] for part in ("p50", "p99"))
        rows.append([f"TTFT at {length}", *p50, p50[1] - p50[0], *p99])
    values = [level["tpot"]["1"]["tpot"]["samples_seconds"] for level in (inside, outside)]
    tpot = [statistics.median(value) * 1e3 for value in values]
    gaps = [level["tpot"]["1"]["gaps"]["summary"]["p99"] * 1e3 for level in (inside, outside)]
    rows.append(["TPOT", *tpot, tpot[1] - tpot[0], *gaps])
    bench.add_table(
        Table(
            "ipc",
            "What the process boundary costs, ms",
            ("", "in process p50", "gRPC p50", "difference", "in process p99", "gRPC p99"),
            rows,
            "gRPC over a Unix socket, by the client's clock; the p99 of TPOT is that of the gaps between tokens",
        )
    )
