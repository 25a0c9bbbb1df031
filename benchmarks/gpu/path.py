"""The way of a lone request through scheduler and engine to its first token, part by part, as host time.

`python -m benchmarks.gpu.path --device cuda --config llama2-7b --out path.json`. Functions of the engine are wrapped while it
runs, which costs each part about a microsecond.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from hotgraph_server.engine.program import StepProgram
from hotgraph_server.engine.state import StepState

WARM_UPS = 3
PARTS = (
    ("schedule", "submitted", "stepped"),  # the scheduler's loop wakes and plans
    ("to the forward thread", "stepped", "launching"),
    ("choose a graph", "launching", "filling"),
    ("fill in and upload", "filling", "filled"),
    ("launch", "filled", "launched"),
    ("device, and its wait", "launched", "read"),
    ("back to the loop", "read", "settled"),
    ("to the reader", "settled", "received"),
)
"""Name, and the stamps it lies between."""


class Stamps:
    """Times of the request under way, by name; of several, the first."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def set(self, name: str) -> None:
        self.times.setdefault(name, time.perf_counter())

    @contextlib.contextmanager
    def around(self, owner: Any, method: str, *, before: str | None = None, after: str | None = None) -> Iterator[None]:
        """Meanwhile calls of this method are stamped."""
        original: Callable[..., Any] = getattr(owner, method)

        def stamped(*arguments: Any, **options: Any) -> Any:
            if before is not None:
                self.set(before)
            result = original(*arguments, **options)
            if after is not None:
                self.set(after)
            return result

        setattr(owner, method, stamped)
        try:
            yield
        finally:
            setattr(owner, method, original)


@contextlib.contextmanager
def stamping(service: Service, stamps: Stamps) -> Iterator[None]:
    """Stamps the places that PARTS names."""
    engine: Any = service.engine
    with contextlib.ExitStack() as stack:
        for owner, method, before, after in (
            (engine, "step", "stepped", None),
            (engine, "_launch", "launching", "launched"),
            (StepState, "fill", "filling", "filled"),
            (StepProgram, "run", None, "launched"),  # without a graph
            (engine, "_read", None, "read"),
            (engine, "_note_done", "settled", None),
        ):
            stack.enter_context(stamps.around(owner, method, before=before, after=after))
        yield


async def measure(arguments: argparse.Namespace, report: Report, loaded: Loaded) -> None:
    """All lengths; results and checks go into the report."""
    settings = make_settings(loaded, num_slots=8, kv_tokens=2 * max(arguments.lengths))
    source = random.Random(arguments.seed)
    vocabulary_size = loaded.model.vocabulary_size
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        infos = await service.warm(service.prompt_key(length) for length in arguments.lengths)
        report.check("every graph asked for was captured", is_passed=not failures(infos), detail=failures(infos))
        await service.settle()
        stamps = Stamps()
        found: dict[str, Any] = {}
        with stamping(service, stamps):
            for length in arguments.lengths:
                samples: dict[str, list[float]] = {name: [] for name, _, _ in PARTS}
                for index in range(WARM_UPS + arguments.samples):
                    await asyncio.sleep(arguments.gap_ms / 1e3)
                    request = service.request(random_prompt(length, vocabulary_size, source), 1)
                    stamps.times = {}
                    stamps.set("submitted")
                    completion = await service.complete(request)
                    stamps.times["received"] = completion.token_seconds[0]
                    if index >= WARM_UPS:
                        for name, begin, end in PARTS:
                            samples[name].append(stamps.times[end] - stamps.times[begin])
                found[str(length)] = {name: summary_of(values) for name, values in samples.items()}
        report.results["parts"] = found


def tables(result: dict[str, Any]) -> str:
    """A Markdown table of a result."""
    parts = result["results"]["parts"]
    lines = [
        "Host time from submit to the first token, ms: p50 (p99)",
        "",
        "| part | " + " | ".join(f"{length} tokens" for length in parts) + " |",
        "|" + "---|" * (1 + len(parts)),
    ]
    for name, _, _ in PARTS:
        cells = [f"{milliseconds(found[name])} ({milliseconds(found[name], 'p99')})" for found in parts.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", machine_line(result["environment"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("The way to the first token, part by part.")
    parser.add_argument("--lengths", type=numbers, default=(10, 100, 500))
    parser.add_argument("--samples", type=int, default=50, help="lone requests of each length")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("path", arguments)
    loaded = make_loaded(arguments.config, device=device_of(arguments), dtype=dtype_of(arguments))
    run(lambda: measure(arguments, report, loaded))
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
