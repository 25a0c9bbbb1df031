"""Time per token by context length, and prompts in one step by length: on the device, on the host, and beside their floors.

`python -m benchmarks.gpu.contexts --device cuda --config llama3-8b --out contexts-llama3-8b.json`. The model is made for
contexts as long as the longest that is asked for, whatever its own limit: times are those of its shape, and with random weights
no text suffers. A context is filled by prompts through the engine, in chunks of a step's tokens; nothing is faked. A step has
up to `--max-step-tokens` tokens here, so that prompts of all lengths are one step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.gpu.device_times import measuring
from benchmarks.gpu.floor import Rates, Sizes, StepShape, floor_cell, measure_rates, rates_line
from benchmarks.gpu.latency import steady_part
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
from benchmarks.gpu.service import BLOCK_SIZE, Service, failures, make_settings, run, serving
from hotgraph_server.engine.kv_cache import block_bytes

NUM_CHECKED_TOKENS = 4
WARM_UPS = 3
SPARE_BYTES = 10 << 30  # of a GPU, beside the weights and the KV cache: graphs, activations, what libraries take
MAX_KEPT = 100


def fill_tokens(context: int, batch: int, arguments: argparse.Namespace) -> int:
    """Tokens that the first of `batch` streams may have before the last one has its first: a step a chunk, and some more."""
    num_chunks = -(-context // max(1, int(arguments.max_step_tokens) - batch))
    return (batch - 1) * (num_chunks + 2)


def room(context: int, batch: int, arguments: argparse.Namespace) -> int:
    """Tokens of one stream at most."""
    return context + int(arguments.tokens) + fill_tokens(context, batch, arguments) + BLOCK_SIZE


def num_positions(arguments: argparse.Namespace) -> int:
    """The longest context that anything here needs."""
    streams = [room(context, batch, arguments) for context in arguments.contexts for batch in arguments.batches]
    return max(*streams, *(int(length) + BLOCK_SIZE for length in arguments.lengths))


def pairs_that_fit(
    arguments: argparse.Namespace, token_bytes: int, free_bytes: float
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(context, batch) of what is to be measured, and of what has no room. token_bytes: of a token in the KV cache."""
    all_pairs = [(context, batch) for batch in arguments.batches for context in arguments.contexts]
    fitting = [
        (context, batch)
        for context, batch in all_pairs
        if batch * room(context, batch, arguments) * token_bytes <= free_bytes
    ]
    return fitting, [pair for pair in all_pairs if pair not in fitting]


async def measure(
    arguments: argparse.Namespace, report: Report, loaded: Loaded, measured: dict[str, Any], sizes: Sizes
) -> None:
    """All contexts and lengths; results and checks go into the report. measured: rates."""
    model = loaded.model
    token_bytes = block_bytes(model.kv_layout, 1, model.dtype)
    free_bytes: float = float("inf")
    if model.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(model.device)[0] - SPARE_BYTES
    fitting, left_out = pairs_that_fit(arguments, token_bytes, free_bytes)
    streams = [batch * room(context, batch, arguments) for context, batch in fitting]
    settings = make_settings(
        loaded,
        num_slots=max(arguments.batches),
        kv_tokens=max([*streams, *(2 * length for length in arguments.lengths)]),
        max_step_tokens=arguments.max_step_tokens,
    )
    rates, source = Rates.of(measured), random.Random(arguments.seed)
    report.results["num_positions"] = model.context_length
    report.results["left_out"] = [
        {"context": context, "batch": batch, "why": "no memory for its KV cache"} for context, batch in left_out
    ]
    async with serving(loaded, settings, run_ahead=run_ahead_of(arguments)) as service:
        keys = [service.prompt_key(length) for length in (*arguments.lengths, arguments.max_step_tokens)]
        keys += [service.decode_key(batch) for batch in (1, *arguments.batches)]
        infos = await service.warm(keys)
        report.check("every graph asked for was captured", is_passed=not failures(infos), detail=failures(infos))
        await service.settle()
        service.engine.graphs.pause()  # chunks beside decoding rows run eagerly, and ask for graphs that nobody needs here
        report.results["prompts"] = [
            await _prompt(service, arguments, report, length, source, sizes, rates) for length in arguments.lengths
        ]
        report.results["tpot"] = [
            await _context(service, arguments, report, context, batch, source, sizes, rates)
            for context, batch in fitting
        ]


async def _prompt(
    service: Service,
    arguments: argparse.Namespace,
    report: Report,
    length: int,
    source: random.Random,
    sizes: Sizes,
    rates: Rates,
) -> dict[str, Any]:
    """Lone prompts of one length."""
    host: list[float] = []
    num_eager = 0
    with measuring(service) as times:
        for index in range(WARM_UPS + arguments.samples):
            await asyncio.sleep(arguments.gap_ms / 1e3)
            prompt = random_prompt(length, service.engine.info.vocabulary_size, source)
            completion = await service.complete(service.request(prompt, 1))
            if index >= WARM_UPS:
                host.append(completion.ttft_seconds)
                num_eager += not completion.is_all_graphs
    report.check(f"prompts of {length} were replayed", is_passed=num_eager == 0, detail=f"{num_eager} ran eagerly")
    device = times.seconds[str(service.prompt_key(length))][WARM_UPS:]
    found = {
        "tokens": length,
        "graph": str(service.prompt_key(length)),
        "host": summary_of(host),
        "device": summary_of(device),
        **floor_cell(sizes, StepShape.prompt(length), rates),
    }
    say(
        f"prompts of {length}: {milliseconds(found['device'])} ms on the device, {milliseconds(found['host'])} to the token"
    )
    return found


async def _context(
    service: Service,
    arguments: argparse.Namespace,
    report: Report,
    context: int,
    batch: int,
    source: random.Random,
    sizes: Sizes,
    rates: Rates,
) -> dict[str, Any]:
    """Streams around one context: between tokens on the host, and steps on the device, while all of them decode."""
    name = f"context {context}, batch {batch}"
    vocabulary_size, tokens = service.engine.info.vocabulary_size, arguments.tokens
    num_prompt = max(1, context - tokens // 2)
    requests = [
        # Who comes first has decoded some tokens before the last one begins to.
        service.request(
            random_prompt(num_prompt, vocabulary_size, source), tokens + fill_tokens(num_prompt, batch, arguments)
        )
        for _ in range(batch)
    ]
    with measuring(service) as times:
        completions = await asyncio.gather(*map(service.complete, requests))
    per_stream, gaps = steady_part([completion.token_seconds for completion in completions])
    report.check(f"{name} was steady", is_passed=bool(per_stream), detail="no time at which all decoded")
    begin = max(completion.token_seconds[0] for completion in completions)
    end = min(completion.token_seconds[-1] for completion in completions)
    counts = [
        [num_prompt + index for index, moment in enumerate(completion.token_seconds) if begin <= moment <= end]
        for completion in completions
    ]
    # The graph of so many rows is first replayed when all decode, and at the end, padded, for those that go on longest.
    num_steady = max(0, min(map(len, counts)) - 1)
    device = times.seconds[str(service.decode_key(batch))][:num_steady]
    is_replayed = len(device) == num_steady >= tokens // 2
    report.check(f"{name} was replayed", is_passed=is_replayed, detail=f"{len(device)} replays, {num_steady} steps")
    if batch == 1:
        checked = service.request(requests[0].prompt_token_ids, NUM_CHECKED_TOKENS)
        verdict = await Oracle(service).check(checked, completions[0].token_ids[:NUM_CHECKED_TOKENS])
        report.check(
            f"tokens at {name} are the eager ones", is_passed=verdict.mismatch is None, detail=verdict.mismatch or ""
        )
    # In the cache before a step of that part. The check above says so where there is none.
    middle = round(mean(itertools.chain.from_iterable(counts))) if num_steady else context
    found = {
        "context": context,
        "batch": batch,
        "middle_context": middle,
        "tpot": summary_of(per_stream),
        "gaps": summary_of(gaps, max_kept=MAX_KEPT),
        "device": summary_of(device),
        **floor_cell(sizes, StepShape.decode(batch, middle), rates),
    }
    say(f"{name}: {milliseconds(found['tpot'])} ms a token, {milliseconds(found['device'])} on the device")
    return found


def _share(cell: dict[str, Any]) -> str:
    """Of its floor in what the device took."""
    if cell["device"]["summary"] is None:
        return ""
    return f"{cell['floor_seconds'] / cell['device']['summary']['p50']:.0%}"


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result."""
    results, config = result["results"], result["settings"]["config"]
    lines = [
        f"Time per output token of {config} by context, ms: p50 (p99 of the gaps between tokens)",
        "",
        "| batch | context | at the reader | on the device | floor | floor's share of the device's |",
        "|---|---|---|---|---|---|",
    ]
    for cell in results["tpot"]:
        reader = f"{milliseconds(cell['tpot'])} ({milliseconds(cell['gaps'], 'p99')})"
        figures = [reader, milliseconds(cell["device"]), f"{cell['floor_seconds'] * 1e3:.2f}", _share(cell)]
        lines.append(f"| {cell['batch']} | {cell['middle_context']} | " + " | ".join(figures) + " |")
    lines += [f"| {pair['batch']} | {pair['context']} | not run: {pair['why']} | | | |" for pair in results["left_out"]]
    lines += [
        "",
        f"Lone prompts of {config} in one step, ms: p50",
        "",
        "| prompt tokens | graph | to the token, on the host | on the device | floor | by | floor's share of the device's |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in results["prompts"]:
        figures = [milliseconds(cell["host"]), milliseconds(cell["device"]), f"{cell['floor_seconds'] * 1e3:.2f}"]
        figures += [cell["bound"], _share(cell)]
        lines.append(f"| {cell['tokens']} | `{cell['graph']}` | " + " | ".join(figures) + " |")
    lines += [
        "",
        f"Made for contexts of {results['num_positions']} tokens, whatever the model's own limit.",
        "",
        rates_line(results["rates"]),
        "",
        machine_line(result["environment"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("Time per token by context, and prompts by length, beside their floors.")
    parser.add_argument("--contexts", type=numbers, default=(256, 1024, 4096, 16384))
    parser.add_argument("--batches", type=numbers, default=(1, 8))
    parser.add_argument("--tokens", type=int, default=96, help="that are measured of each stream, around its context")
    parser.add_argument(
        "--lengths", type=numbers, default=(16, 32, 64, 128, 256, 512, 1024, 2048), help="of lone prompts"
    )
    parser.add_argument("--samples", type=int, default=30, help="lone prompts of each length")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument(
        "--max-step-tokens", type=int, default=2048, help="of a step: the longest lone prompt, and a chunk"
    )
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("contexts", arguments)
    device, dtype = device_of(arguments), dtype_of(arguments)
    report.results["rates"] = measured = measure_rates(device, dtype)
    loaded = make_loaded(arguments.config, device=device, dtype=dtype, num_positions=num_positions(arguments))
    sizes = Sizes.of(arguments.config, dtype)
    run(lambda: measure(arguments, report, loaded, measured, sizes))
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
