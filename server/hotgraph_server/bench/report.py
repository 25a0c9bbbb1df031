"""A result on a terminal, as rich tables. It computes nothing but units."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hotgraph_server.bench.compare import Comparison
from hotgraph_server.bench.result import Result
from hotgraph_server.bench.summary import Summary

_LATENCY_TITLES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "end_to_end": "end to end",
    "server_ttft": "TTFT in the server",
    "server_queue": "queue in the server",
    "server_prefill": "prefill in the server",
    "lag": "lag of the bench",
}


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.3f}" if value < 10 else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def latency_table(latencies: dict[str, Summary | None]) -> Table:
    """One row a latency, milliseconds."""
    table = Table(title="Latency, ms", title_justify="left")
    table.add_column("")
    for column in ("mean", "p50", "p95", "p99", "min", "max", "values"):
        table.add_column(column, justify="right")
    for name, summary in latencies.items():
        title = _LATENCY_TITLES[name]
        if summary is None:
            table.add_row(title, *["-"] * 6, "0")
            continue
        values = (summary.mean, summary.p50, summary.p95, summary.p99, summary.minimum, summary.maximum)
        table.add_row(title, *map(_milliseconds, values), f"{summary.count:,}")
    return table


def throughput_table(result: Result) -> Table:
    """Rates and counts."""
    table = Table(title="Throughput", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    flow = result.throughput
    num_steps = result.num_graph_steps + result.num_eager_steps
    rows = {
        "output tokens/s": f"{flow.output_tokens_per_second:,.1f}",
        "total tokens/s (prompt and output)": f"{flow.total_tokens_per_second:,.1f}",
        "requests/s": f"{flow.requests_per_second:,.2f}",
        "seconds": f"{flow.seconds:,.2f}",
        "requests that went well": f"{result.num_ok:,} of {result.num_requests:,}",
        "prompt tokens, from the prefix cache": f"{flow.num_prompt_tokens:,}, {result.num_cached_prompt_tokens:,}",
        "output tokens": f"{flow.num_output_tokens:,}",
        "steps that replayed a graph": f"{result.num_graph_steps:,} of {num_steps:,}",
        "pre-emptions": f"{result.num_preemptions:,}",
    }
    for title, value in rows.items():
        table.add_row(title, value)
    return table


def error_table(result: Result) -> Table:
    """Failures by reason, with one message each."""
    table = Table(title="Failures", title_justify="left", style="red")
    table.add_column("reason")
    table.add_column("requests", justify="right")
    table.add_column("for example")
    for reason, count in result.errors.items():
        table.add_row(reason, f"{count:,}", Text(result.error_examples[reason]))
    return table


def render_result(result: Result, heading: str) -> RenderableType:
    """Everything about one run, under a line that says what was run."""
    parts: list[RenderableType] = [Text(heading), latency_table(result.latencies), throughput_table(result)]
    if result.errors:
        parts.append(error_table(result))
    parts.extend(Text(f"note: {warning}", style="yellow") for warning in result.warnings)
    return Group(*parts)


def render_comparison(comparison: Comparison, heading: str) -> RenderableType:
    """tokens/s of both sides by number of clients, and their ratio, under a line that says what was run."""
    table = Table(title="Output tokens/s (median of the rounds)", title_justify="left")
    table.add_column("clients", justify="right")
    for column in ("transformers generate", "hotgraph", "ratio", "ratios of the rounds", "same tokens"):
        table.add_column(column, justify="right")
    for line in comparison.lines:
        rounds = " ".join(f"{ratio:.2f}" for ratio in line.ratios)
        same = f"{line.num_same} of {line.num_sequences}"
        theirs, ours = f"{line.transformers_tokens_per_second:,.1f}", f"{line.hotgraph_tokens_per_second:,.1f}"
        table.add_row(str(line.num_clients), theirs, ours, Text(f"{line.ratio:.2f}x", style="bold"), rounds, same)
    parts: list[RenderableType] = [Text(heading), table]
    parts.extend(
        Text(
            f"for information: transformers' generate on all {line.num_clients} prompts as one padded batch gives "
            f"{line.batched_tokens_per_second:,.1f} tokens/s; hotgraph is {line.batched_ratio:.2f}x of that"
        )
        for line in comparison.lines
        if line.num_clients > 1 and line.batched_tokens_per_second
    )
    return Group(*parts)
