"""The paper's comparison: time to first token by prompt length, and latency by context while decoding, for every mode."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.report import milliseconds, say, summary_of
from benchmarks.paper.bench import Bench
from benchmarks.paper.modes import MODES, Mode, NotRunError, TransformersEager
from benchmarks.paper.tables import Cell, Table


async def ttft(bench: Bench) -> None:
    """TTFT of every mode at every length: `--iterations` for the mean, `--p99-iterations` for the tail."""
    arguments = bench.arguments
    lengths = arguments.lengths
    modes = await _first_tokens(bench, lengths, max(arguments.iterations, arguments.p99_iterations))
    bench.report.results["ttft"] = modes
    names = list(modes)
    means: list[list[Cell]] = [[length, *(_mean(modes[name], length) for name in names)] for length in lengths]
    tails: list[list[Cell]] = [[length, *(_p99(modes[name], length) for name in names)] for length in lengths]
    note = _note(modes)
    title = f"Time to first token, ms: mean of {arguments.iterations} iterations (standard deviation)"
    bench.add_table(Table("ttft", title, ("prompt tokens", *names), means, note))
    title = f"Time to first token, ms: p99 of {arguments.p99_iterations} iterations"
    bench.add_table(Table("ttft-p99", title, ("prompt tokens", *names), tails, note))


async def ttft_long(bench: Bench) -> None:
    """The paper's long run: TTFT of every mode at a few lengths, `--long-iterations` times."""
    arguments = bench.arguments
    modes = await _first_tokens(bench, arguments.long_lengths, arguments.long_iterations)
    bench.report.results["ttft_long"] = modes
    rows: list[list[Cell]] = []
    for length in arguments.long_lengths:
        for name, mode in modes.items():
            found = mode["lengths"][str(length)]["many"]["summary"] if "lengths" in mode else {}
            tail = [found[part] * 1e3 if found else None for part in ("p50", "p99", "maximum")]
            rows.append([length, name, *tail, found["p99"] / found["p50"] if found else None])
    title = f"Time to first token, ms: {arguments.long_iterations} iterations"
    columns = ("prompt tokens", "mode", "p50", "p99", "maximum", "p99 over p50")
    bench.add_table(Table("ttft-long", title, columns, rows, _note(modes)))


async def _first_tokens(bench: Bench, lengths: Sequence[int], num_samples: int) -> dict[str, Any]:
    """What is told of each mode: so many first tokens at each of the lengths, or why there are none."""
    modes: dict[str, Any] = {}
    tokens: dict[str, dict[int, int]] = {}
    for name in bench.arguments.modes:
        try:
            async with MODES[name](bench) as mode:
                tokens[name] = {}
                modes[name] = {"lengths": await _ttft_of(bench, name, mode, lengths, num_samples, tokens[name])}
        except (NotRunError, RuntimeError) as error:
            modes[name] = _not_run(bench, name, error)
            tokens.pop(name, None)
    _check_tokens(bench, tokens)
    return modes


def _not_run(bench: Bench, name: str, error: Exception) -> dict[str, Any]:
    """What stands for a mode that cannot do what is asked, or failed at it: then a check fails, and the others go on."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    if not isinstance(error, NotRunError):
        bench.report.check(f"{name} ran", is_passed=False, detail=reason)
        bench.free()
    say(f"{name}: not run, {reason}")
    return {"not_run": reason}


async def _ttft_of(
    bench: Bench, name: str, mode: Mode, lengths: Sequence[int], num_samples: int, tokens: dict[int, int]
) -> dict[str, Any]:
    """By length: of the first `--iterations` samples, and of all under "many". tokens: takes the first prompts' tokens."""
    num_few = bench.arguments.iterations
    found: dict[str, Any] = {}
    await mode.prepare(lengths)
    for length in lengths:
        for _ in range(2):  # allocator and clocks
            await mode.first_token(bench.prompt(length, -1))
        prompts = [bench.prompt(length, i) for i in range(num_samples)]
        samples, token_ids = await time_first_token(bench, mode, prompts)
        tokens[length] = token_ids[0]
        few = summary_of(samples[:num_few])
        deviation = statistics.stdev(samples[:num_few]) if num_few > 1 else 0.0
        found[str(length)] = {**few, "deviation_seconds": deviation, "many": summary_of(samples)}
        tail = milliseconds(found[str(length)]["many"], "p99")
        say(f"{name}, {length} tokens: {milliseconds(few, 'mean')} ms, p99 of {num_samples} {tail}")
    return found


async def time_first_token(bench: Bench, mode: Mode, prompts: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
    """Seconds and token of each prompt, with the gap before it that lone requests keep."""
    samples = []
    token_ids = []
    for prompt in prompts:
        await asyncio.sleep(bench.gap_seconds)
        begin_seconds = time.perf_counter()
        token_ids.append(await mode.first_token(prompt))
        samples.append(time.perf_counter() - begin_seconds)
    return samples, token_ids


def _check_tokens(bench: Bench, tokens: dict[str, dict[int, int]]) -> None:
    """Every mode of the same weights gave a token that transformers finds likeliest, but for rounding."""
    ours = {name: found for name, found in tokens.items() if name not in ("vLLM", "TensorRT-LLM")}
    if not ours:
        return
    judge = TransformersEager(bench.transformers())
    for name, found in ours.items():
        wrong = [
            length for length, token_id in found.items() if not judge.is_likeliest(bench.prompt(length, 0), token_id)
        ]
        bench.report.check(f"{name}: first tokens are transformers'", is_passed=not wrong, detail=f"not at {wrong}")


def check_texts(bench: Bench, prompt: Sequence[int], texts: dict[str, list[int]]) -> None:
    """Of each mode's text after the prompt a few tokens, the last among them, are what transformers finds likeliest there."""
    if not texts:
        return
    judge = TransformersEager(bench.transformers())
    for name, text in texts.items():
        places = {0, len(text) // 4, len(text) // 2, len(text) - 1}
        wrong = [i for i in sorted(places) if not judge.is_likeliest([*prompt, *text[:i]], text[i])]
        bench.report.check(f"{name}: tokens are transformers'", is_passed=not wrong, detail=f"not at {wrong}")


def _mean(mode: dict[str, Any], length: int) -> Cell:
    if "lengths" not in mode:
        return None
    part = mode["lengths"][str(length)]
    return f"{milliseconds(part, 'mean')} ({part['deviation_seconds'] * 1e3:.2f})"


def _p99(mode: dict[str, Any], length: int) -> Cell:
    return float(mode["lengths"][str(length)]["many"]["summary"]["p99"]) * 1e3 if "lengths" in mode else None


def _note(modes: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {mode['not_run']}" for name, mode in modes.items() if "not_run" in mode)


async def decode(bench: Bench) -> None:
    """Time of each token from a short prompt to a long context, in every mode that tells; `--repeats` times."""
    arguments = bench.arguments
    first, last = arguments.decode_from, arguments.decode_to
    modes: dict[str, Any] = {}
    texts: dict[str, list[int]] = {}
    for name in arguments.modes:
        try:
            async with MODES[name](bench) as mode:
                modes[name], texts[name] = await _decode_of(bench, mode)
        except (NotRunError, RuntimeError) as error:
            modes[name] = _not_run(bench, name, error)
    bench.report.results["decode"] = modes
    check_texts(bench, bench.prompt(first, 0), texts)
    rows: list[list[Cell]] = []
    for name, found in modes.items():
        if "not_run" in found:
            rows.append([name, None, None, None, None, None])
            continue
        summary = found["all"]["summary"]
        cold = statistics.fmean(found["first_pass_seconds"]) * 1e3
        rows.append([name, *(summary[part] * 1e3 for part in ("mean", "p50", "p99", "maximum")), cold])
        say(f"{name}: {milliseconds(found['all'], 'mean')} ms a token, {cold:.2f} on the first pass")
    bench.add_table(
        Table(
            "decode",
            f"Decode latency from {first} to {last} tokens of context, ms a token",
            ("mode", "mean", "p50", "p99", "maximum", "mean of the first pass"),
            rows,
            "; ".join(
                part
                for part in ("the first pass meets what was not captured yet and is not in the rest", _note(modes))
                if part
            ),
        )
    )
    contexts = [context for context in arguments.decode_points if first < context <= last]
    bench.add_table(
        Table(
            "decode-by-context",
            "Decode latency by context, ms a token (median of the repeats)",
            ("context", *modes),
            [[context, *(_at(found, context - first - 1) for found in modes.values())] for context in contexts],
            _note(modes),
        )
    )


async def _decode_of(bench: Bench, mode: Mode) -> tuple[dict[str, Any], list[int]]:
    """What is told of the mode, and the tokens of its first pass."""
    arguments = bench.arguments
    first, last = arguments.decode_from, arguments.decode_to
    await mode.prepare([first])
    passes = []
    text: list[int] = []
    for index in range(1 + arguments.repeats):
        tokens, times = await mode.generate(bench.prompt(first, index), last - first + 1)
        text = text or tokens
        passes.append([later - earlier for earlier, later in itertools.pairwise(times)])
    warm = passes[1:]
    by_context = [statistics.median(part[i] for part in warm) for i in range(len(warm[0]))]
    found = {
        "first_pass_seconds": passes[0],
        "by_context_seconds": by_context,
        "all": summary_of([gap for part in warm for gap in part]),
    }
    return found, text


def _at(found: dict[str, Any], index: int) -> Cell:
    return float(found["by_context_seconds"][index]) * 1e3 if "not_run" not in found else None


def check_modes(names: Sequence[str]) -> None:
    """Raises ValueError for a mode that there is not."""
    unknown = [name for name in names if name not in MODES]
    if unknown:
        raise ValueError(f"no such mode: {', '.join(unknown)}; there are {', '.join(MODES)}")
