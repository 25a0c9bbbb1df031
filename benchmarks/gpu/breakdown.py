"""Where the time of a step goes: the kernels of decode steps and of lone prompts, by name, with the gaps between them.

`python -m benchmarks.gpu.breakdown --device cuda --config llama2-7b --out breakdown.json`. Kernels are timed by the driver's
own tracing while requests are served through graphs; tracing makes a step a little longer, so totals are not latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.models import Loaded, make_loaded, random_prompt
from benchmarks.gpu.report import Report, device_of, dtype_of, machine_line, make_parser, numbers, run_ahead_of, say
from benchmarks.gpu.service import Service, failures, make_settings, run, serving

NAME_LENGTH = 60
LAST_KERNELS = ("_finish_kernel", "_write_ring_kernel")  # of a step, by its sampler


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, or a copy, as it ran: microseconds on the device's clock."""

    name: str
    begin_us: float
    end_us: float


def spans_of(profiler: Any) -> list[Span]:
    """What ran on the device, in the order of its begin."""
    found = [
        Span(short_name(event.name), event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    return sorted(found, key=lambda span: span.begin_us)


def short_name(name: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters, as far as it still tells kernels apart."""
    bare = re.sub(r"\(anonymous namespace\)::|at::native::|void |<unnamed>::", "", name)
    functor = re.search(r"(\w+(?:Functor|Op|_kernel_cuda|Ops)\w*)", bare[bare.find("<") :]) if "<" in bare else None
    head = re.split(r"[<(]", bare)[0]
    return (f"{head} {functor.group(1)}" if functor else head)[:NAME_LENGTH]


def table_of(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """Per step: microseconds and calls of each kernel, all that was busy, and gaps of less than a millisecond between spans.

    Kernels that overlap are each counted whole; `busy_us` counts such time once.
    """
    if not spans:
        return {"num_steps": 0, "kernels": [], "busy_us": 0.0, "gaps_us": 0.0}
    total: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    busy = gaps = 0.0
    reached = spans[0].begin_us
    for span in spans:
        total[span.name] += span.end_us - span.begin_us
        calls[span.name] += 1
        if 0.0 < span.begin_us - reached < 1000.0:
            gaps += span.begin_us - reached
        busy += max(0.0, span.end_us - max(reached, span.begin_us))
        reached = max(reached, span.end_us)
    kernels = [
        {"name": name, "us": us / num_steps, "calls": calls[name] / num_steps}
        for name, us in sorted(total.items(), key=lambda item: -item[1])
    ]
    return {"num_steps": num_steps, "kernels": kernels, "busy_us": busy / num_steps, "gaps_us": gaps / num_steps}


async def measure(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> None:
    """All shapes; results and checks go into the report."""
    context = arguments.batch_prompt + arguments.tokens
    settings = make_settings(
        loaded,
        num_slots=max(8, *arguments.batches),
        kv_tokens=max(max(arguments.batches) * context, 2 * max(arguments.lengths)),
    )
    source = random.Random(arguments.seed)
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        keys = [service.prompt_key(length) for length in arguments.lengths]
        keys += [service.decode_key(batch) for batch in (1, *arguments.batches)]
        infos = await service.warm(keys)
        report.check("every graph asked for was captured", is_passed=not failures(infos), detail=failures(infos))
        await service.settle()
        service.engine.graphs.pause()  # tracing waits for the whole device, which must not happen beside a capture
        found: dict[str, Any] = {}
        for batch in arguments.batches:
            found[f"decode, batch {batch}"] = await _decode(service, arguments, batch, source)
        for length in arguments.lengths:
            found[f"prompt of {length}"] = await _prompts(service, arguments, length, source)
        report.results["steps"] = found
        for name, table in found.items():
            report.check(f"{name}: kernels were seen", is_passed=bool(table["kernels"]))


async def _decode(service: Service, arguments: argparse.Namespace, batch: int, source: random.Random) -> dict[str, Any]:
    """Steps of so many streams while all of them decode."""
    vocabulary_size = service.engine.info.vocabulary_size
    done = asyncio.Event()
    num_first = 0

    async def stream() -> None:
        nonlocal num_first
        request = service.request(random_prompt(arguments.batch_prompt, vocabulary_size, source), arguments.tokens)
        completion_tokens = 0
        async with service.scheduler.submit(request) as events:
            async for event in events:
                if hasattr(event, "token_ids"):
                    num_first += completion_tokens == 0
                    completion_tokens += len(event.token_ids)
                    if num_first == batch:
                        done.set()

    tasks = [asyncio.create_task(stream()) for _ in range(batch)]
    await done.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        await asyncio.sleep(arguments.window_seconds)
    await asyncio.gather(*tasks)
    spans = spans_of(profiler)
    return table_of(spans, max(1, sum(span.name in LAST_KERNELS for span in spans)))


async def _prompts(
    service: Service, arguments: argparse.Namespace, length: int, source: random.Random
) -> dict[str, Any]:
    """Lone prompts, one after the other."""
    vocabulary_size = service.engine.info.vocabulary_size
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(arguments.samples):
            await asyncio.sleep(arguments.gap_ms / 1e3)
            await service.complete(service.request(random_prompt(length, vocabulary_size, source), 1))
    return table_of(spans_of(profiler), arguments.samples)


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result: the longest kernels of each step."""
    lines = []
    for name, table in result["results"]["steps"].items():
        lines += [
            f"{name}: busy {table['busy_us'] / 1e3:.2f} ms a step, {table['gaps_us'] / 1e3:.2f} ms between kernels",
            "",
            "| kernel | calls a step | µs a call | ms a step |",
            "|---|---|---|---|",
        ]
        for kernel in table["kernels"][:16]:
            each = kernel["us"] / kernel["calls"]
            lines.append(f"| `{kernel['name']}` | {kernel['calls']:.0f} | {each:.1f} | {kernel['us'] / 1e3:.3f} |")
        lines.append("")
    return "\n".join([*lines, machine_line(result["environment"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Where the time of a step goes, by kernel.")
    parser.add_argument("--batches", type=numbers, default=(1, 8, 64))
    parser.add_argument("--lengths", type=numbers, default=(32, 128, 500))
    parser.add_argument("--batch-prompt", type=int, default=192, help="prompt tokens of the steady streams")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each stream")
    parser.add_argument("--window-seconds", type=float, default=0.2, help="of decoding that is traced")
    parser.add_argument("--samples", type=int, default=10, help="prompts of each length")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("breakdown", arguments)
    with profile(activities=[ProfilerActivity.CUDA]):
        pass  # the first one sets tracing up, before any graph is made, and takes its time
    loaded = make_loaded(arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
    run(lambda: measure(arguments, report, loaded))
    status = report.finish(arguments.out)
    if report.is_passed:
        say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
