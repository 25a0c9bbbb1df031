"""Where the time of a step goes: the kernels of decode steps and of lone prompts, what each moves, and how fast.

`python -m benchmarks.gpu.breakdown --device cuda --config llama2-7b --out breakdown-llama2-7b.json`. Kernels are timed by the
driver's own tracing while requests are served through graphs. Tracing makes a step longer, so each step is also timed without
it, on the device. The bytes are those that a kernel cannot do without (`benchmarks/gpu/floor.py`), each once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device_times import measuring
from benchmarks.gpu.floor import Rates, Sizes, StepShape, Work, floor_cell, measure_rates, rates_line, role_work
from benchmarks.gpu.models import Loaded, make_loaded, random_prompt
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
from benchmarks.gpu.service import Service, failures, make_settings, run, serving
from benchmarks.gpu.trace import PRODUCTS, Span, TracedStep, lone_steps, spans_of, trace_step, whole_steps
from graphcache import Backend
from hotgraph_server.batch import StepKey

MAX_STEPS = 40  # whose times are kept of each shape


@contextlib.contextmanager
def tracing(*, is_traced: bool) -> Iterator[Callable[[], list[Span]]]:
    """What ran on the device meanwhile: to be asked for afterwards. Nothing, where there is no device to trace."""
    if not is_traced:
        yield list
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield lambda: spans_of(profiler)


def noting_backend(device: Any, topologies: dict[str, dict[str, int]]) -> Backend | None:
    """The CUDA backend, which puts each captured graph's nodes and edges into `topologies` by its name; None without CUDA."""
    if device.type != "cuda":
        return None
    from graphcache.backends.cuda import CudaBackend
    from graphcache.backends.cuda_captured import CudaCaptured

    class NotingBackend(CudaBackend):
        """As its parent, with a note of each graph."""

        def capture(self, name: str, work: Callable[[], None]) -> CudaCaptured:
            """See Backend."""
            captured = super().capture(name, work)
            topologies[name] = topology(captured)
            return captured

    return NotingBackend(device)


def topology(captured: Any) -> dict[str, int]:
    """Of a CudaCaptured, for a result."""
    return {name: getattr(captured, name) for name in ("num_nodes", "num_edges", "num_programmatic_edges")}


def table_of(
    steps: Sequence[Sequence[Span]], sizes: Sizes, shape: StepShape, *, keeps_timeline: bool = False
) -> dict[str, Any]:
    """What the traced steps of one shape come to: by role calls, work, and seconds of each step, added and as spans.

    `are_roles_told`: else all products stand together. With `keeps_timeline` the kernels of a step of median length, too.
    """
    traced = [trace_step(spans, sizes.num_layers) for spans in steps]
    found = [step for step, _ in traced]
    are_roles_told = bool(traced) and all(is_told for _, is_told in traced)
    calls: defaultdict[str, Counter[str]] = defaultdict(Counter)
    added: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(found))
    spans: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(found))
    for index, step in enumerate(found):
        for part in step.parts:
            calls[part.role][part.span.name] += 1
            added[part.role][index] += part.added_us / 1e6
            spans[part.role][index] += (part.span.end_us - part.span.begin_us) / 1e6
    works = _works(sizes, shape)
    roles = {
        role: {
            "kernels": {name: count / len(found) for name, count in calls[role].most_common()},
            "work": works[role].to_dict() if role in works else None,
            "added": summary_of(added[role], max_kept=MAX_STEPS),
            "span": summary_of(spans[role], max_kept=MAX_STEPS),
        }
        for role in calls
    }
    return {
        "num_steps": len(found),
        "are_roles_told": are_roles_told,
        "traced": summary_of([step.seconds for step in found], max_kept=MAX_STEPS),
        "gaps": summary_of([step.gap_seconds for step in found], max_kept=MAX_STEPS),
        "overlap": summary_of([step.overlap_seconds for step in found], max_kept=MAX_STEPS),
        "roles": roles,
        "timeline": _timeline(found) if keeps_timeline and found else [],
    }


def _works(sizes: Sizes, shape: StepShape) -> dict[str, Work]:
    """By role, and of all products together for where they cannot be told apart."""
    found = role_work(sizes, shape)
    products = [found[role] for role in ("qkv", "output", "gate_up", "down", "head")]
    return {**found, PRODUCTS: sum(products, Work())}


def _timeline(steps: Sequence[TracedStep]) -> list[list[Any]]:
    """The kernels of a step of median length: [name, role, layer, begin, end], microseconds from the step's begin."""
    step = sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]
    first = step.parts[0].span.begin_us
    return [
        [
            part.span.name,
            part.role,
            part.layer,
            round(part.span.begin_us - first, 3),
            round(part.span.end_us - first, 3),
        ]
        for part in step.parts
    ]


async def measure(
    arguments: argparse.Namespace, report: Report, loaded: Loaded, measured: dict[str, Any], sizes: Sizes
) -> None:
    """All shapes; results and checks go into the report. measured: rates."""
    is_traced = loaded.model.device.type == "cuda"
    settings = make_settings(
        loaded,
        num_slots=max(8, *arguments.batches),
        kv_tokens=max(arguments.kv_tokens, 2 * max(arguments.lengths)),
        max_step_tokens=max(512, *arguments.lengths),
    )
    source = random.Random(arguments.seed)
    topologies: dict[str, dict[str, int]] = {}
    backend = noting_backend(loaded.model.device, topologies)
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments), backend=backend) as service:
        keys = [service.prompt_key(length) for length in arguments.lengths]
        keys += [service.decode_key(batch) for batch in (1, *arguments.batches)]
        infos = await service.warm(keys)
        report.check("every graph asked for was captured", is_passed=not failures(infos), detail=failures(infos))
        await service.settle()
        service.engine.graphs.pause()  # tracing waits for the whole device, which must not happen beside a capture
        found: dict[str, Any] = {}

        def note(name: str, key: StepKey | None, shape: StepShape, device: Sequence[float], steps: Any) -> None:
            table = table_of(steps, sizes, shape, keeps_timeline=not found)
            found[name] = {
                "graph": {"name": str(key), **topologies.get(str(key), {})},
                "rows": [list(row) for row in shape.rows],
                "device": summary_of(device, max_kept=MAX_STEPS),
                **floor_cell(sizes, shape, Rates.of(measured)),
                **table,
            }
            report.check(f"{name}: the graph was replayed", is_passed=bool(device))
            if is_traced:
                report.check(f"{name}: kernels were seen", is_passed=bool(table["roles"]))

        for batch in arguments.batches:
            key = service.decode_key(batch)
            device, steps, middle = await _decode(service, arguments, batch, source, is_traced=is_traced)
            note(f"decode, batch {batch}", key, padded(StepShape.decode(batch, middle), key), device, steps)
        for length in arguments.lengths:
            key = service.prompt_key(length)
            device, steps = await _prompts(service, arguments, length, source, is_traced=is_traced)
            note(f"prompt of {length}", key, padded(StepShape.prompt(length), key), device, steps)
        report.results["steps"] = found


def padded(shape: StepShape, key: StepKey | None) -> StepShape:
    """What the graph `key` computes for such a step: rows of one token more, or a longer lone prompt."""
    if key is None:
        return shape
    if shape.num_tokens == len(shape.rows):
        return StepShape(shape.rows + ((0, 1),) * (key.rows - len(shape.rows)))
    (row,) = shape.rows
    return StepShape(((row[0], key.tokens),))


async def _decode(
    service: Service, arguments: argparse.Namespace, batch: int, source: random.Random, *, is_traced: bool
) -> tuple[list[float], list[list[Span]], int]:
    """Steps of so many streams while all of them decode: seconds on the device, then spans, and tokens of context between.

    Each of the two has a set of streams of its own.
    """
    key = str(service.decode_key(batch))
    with measuring(service) as times:
        await _streams(service, arguments, batch, source, is_traced=False)
    device = times.seconds[key]
    device = device[len(device) // 4 :]  # the first may be of the way there, padded
    spans, middle = await _streams(service, arguments, batch, source, is_traced=is_traced)
    return device, [step for step in whole_steps(spans) if step], middle


async def _streams(
    service: Service, arguments: argparse.Namespace, batch: int, source: random.Random, *, is_traced: bool
) -> tuple[list[Span], int]:
    """So many streams, traced for a while from when all of them decode, then left; context at the middle of that."""
    info = service.engine.info
    max_tokens = min(arguments.kv_tokens // batch, info.context_length) - arguments.batch_prompt  # they are left before
    all_decode = asyncio.Event()
    is_over = False
    counts = [0] * batch

    async def stream(index: int) -> None:
        request = service.request(random_prompt(arguments.batch_prompt, info.vocabulary_size, source), max_tokens)
        async with service.scheduler.submit(request) as events:
            async for event in events:
                if hasattr(event, "token_ids"):
                    counts[index] += len(event.token_ids)
                    if all(counts):
                        all_decode.set()
                if is_over:
                    break

    tasks = [asyncio.create_task(stream(index)) for index in range(batch)]
    await all_decode.wait()
    before = sum(counts)
    with tracing(is_traced=is_traced) as traced:
        await asyncio.sleep(arguments.window_seconds)
        after = sum(counts)
    is_over = True
    await asyncio.gather(*tasks)
    return traced(), arguments.batch_prompt + round((before + after) / 2 / batch)


async def _prompts(
    service: Service, arguments: argparse.Namespace, length: int, source: random.Random, *, is_traced: bool
) -> tuple[list[float], list[list[Span]]]:
    """Lone prompts, one after the other: seconds on the device, then spans."""

    async def prompts() -> None:
        for _ in range(arguments.samples):
            await asyncio.sleep(arguments.gap_ms / 1e3)
            prompt = random_prompt(length, service.engine.info.vocabulary_size, source)
            await service.complete(service.request(prompt, 1))

    with measuring(service) as times:
        await prompts()
    with tracing(is_traced=is_traced) as traced:
        await prompts()
    return times.seconds[str(service.prompt_key(length))], [step for step in lone_steps(traced()) if step]


def step_table(name: str, step: dict[str, Any], rates: Rates) -> str:
    """Markdown of one step: its kernels by role, longest first, and what they come to."""
    graph = step["graph"]
    lines = [f"{name}: {milliseconds(step['device'])} ms on the device, floor {step['floor_seconds'] * 1e3:.2f} ms", ""]
    if "num_edges" in graph:
        edges = f"{graph['num_programmatic_edges']} of {graph['num_edges']} edges programmatic"
        lines[0] += f"; {graph['num_nodes']} nodes, {edges}"
    if not step["roles"]:
        return "\n".join([*lines, "No kernels were traced."])
    lines[0] += (
        f"; traced {milliseconds(step['traced'])} ms, {milliseconds(step['gaps'])} ms of it between kernels, "
        f"{milliseconds(step['overlap'])} ms overlapped"
    )
    lines += [
        "| role | kernels | calls | MB | ms | TB/s | of copying | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(step["roles"].items(), key=lambda item: -item[1]["added"]["summary"]["p50"])
    for role, part in order:
        lines.append(_role_row(role, part, rates))
    return "\n".join(lines)


def _role_row(role: str, part: dict[str, Any], rates: Rates) -> str:
    seconds = part["added"]["summary"]["p50"]
    names = ", ".join(f"`{name}`" for name in list(part["kernels"])[:3])
    cells = [role, names, f"{sum(part['kernels'].values()):.0f}"]
    if part["work"] is None or seconds <= 0:
        return "| " + " | ".join([*cells, "", f"{seconds * 1e3:.3f}", "", "", ""]) + " |"
    work = Work(**part["work"])
    rate = work.all_bytes / seconds
    cells += [f"{work.all_bytes / 1e6:.1f}", f"{seconds * 1e3:.3f}", f"{rate / 1e12:.2f}"]
    cells += [f"{rate / rates.copy_bytes:.0%}", f"{work.flops / seconds / 1e12:.1f}" if work.flops else ""]
    return "| " + " | ".join(cells) + " |"


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result: the kernels of each step."""
    results = result["results"]
    rates = Rates.of(results["rates"])
    parts = [step_table(name, step, rates) + "\n" for name, step in results["steps"].items()]
    note = (
        "ms: what the kernels of a role add to a traced step, p50; MB: what they must move, each byte once, from memory "
        "or from the chip's cache."
    )
    return "\n".join([*parts, note, "", rates_line(results["rates"]), "", machine_line(result["environment"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Where the time of a step goes, by kernel.")
    parser.add_argument("--batches", type=numbers, default=(1, 2, 8, 64))
    parser.add_argument("--lengths", type=numbers, default=(32, 64, 128, 512))
    parser.add_argument("--batch-prompt", type=int, default=192, help="prompt tokens of the steady streams")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="that all streams together may take")
    parser.add_argument("--window-seconds", type=float, default=0.15, help="of decoding that is traced")
    parser.add_argument("--samples", type=int, default=10, help="prompts of each length")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("breakdown", arguments)
    device, dtype = device_of(arguments), dtype_of(arguments)
    with tracing(is_traced=device.type == "cuda"):
        pass  # the first one sets tracing up, before any graph is made, and takes its time
    report.results["rates"] = measured = measure_rates(device, dtype)
    loaded = make_loaded(arguments.config, device=device, dtype=dtype)
    sizes = Sizes.of(arguments.config, dtype)
    run(lambda: measure(arguments, report, loaded, measured, sizes))
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
