"""The tables of measured figures, from raw results: `python -m benchmarks.tables [RESULT.json ...]`.

Without names it makes the README's: of the CPU, and of each GPU benchmark with a result of its name in results/gpu; those of
several models stand in docs/kernels.md (`gpu/page.py`). It computes medians and percentiles of samples that are there and
nothing else; a figure that is in no result cannot come out of it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"

GPU_TABLES = {
    "latency": ("benchmarks.gpu.latency", "tables"),
    "storm": ("benchmarks.gpu.storm", "summary"),
    "interference": ("benchmarks.gpu.interference", "tables"),
    "graphs": ("benchmarks.gpu.graphs", "tables"),
    "floor": ("benchmarks.gpu.floor", "tables"),
    "contexts": ("benchmarks.gpu.contexts", "tables"),
    "breakdown": ("benchmarks.gpu.breakdown", "tables"),
    "path": ("benchmarks.gpu.path", "tables"),
}
"""Where the tables of each of our GPU benchmarks are made: imported when one is asked for, since that needs torch."""


def comparison_table(result: dict[str, Any]) -> str:
    """A Markdown table of a run of `hotgraph bench --compare-transformers`: medians of its rounds, in tokens/s."""
    lines = [
        "| clients | transformers' `generate`, tokens/s | hotgraph, tokens/s | ratio (lowest and highest of the rounds) |",
        "|---|---|---|---|",
    ]
    for line in result["result"]:
        theirs = median(line["transformers_tokens_per_second"])
        ours = median(line["hotgraph_tokens_per_second"])
        ratios = line["ratios"]
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        lines.append(f"| {line['num_clients']} | {theirs:.1f} | {ours:.1f} | **{median(ratios):.2f}** {spread} |")
        batched = line["transformers_batched_tokens_per_second"]
        if batched:
            count = line["num_clients"]
            lines.append(f"| {count}, as one padded batch on their side | {median(batched):.1f} | {ours:.1f} | |")
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """The Markdown of any result that this project writes. Raises ValueError for what it does not know."""
    if isinstance(result.get("result"), list):
        return comparison_table(result)
    name = result.get("name")
    if name in GPU_TABLES:
        module, function = GPU_TABLES[name]
        text: str = getattr(importlib.import_module(module), function)(result)
        return text
    if "tables" in result.get("results", {}):
        paper = importlib.import_module("benchmarks.paper.tables")
        return str(paper.all_markdown(result))
    raise ValueError("no result of a benchmark of ours")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the tables to standard output. Returns 1 when a file holds no result."""
    names = sys.argv[1:] if argv is None else argv
    if not names:
        result = json.loads((RESULTS / "cpu-comparison.json").read_text())
        sys.stdout.write(comparison_table(result) + "\n")
        folder = RESULTS / "gpu"
        names = [str(path) for name in GPU_TABLES if (path := folder / f"{name}.json").is_file()]
    for path in map(Path, names):
        try:
            text = tables(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            sys.stderr.write(f"{path}: {error}\n")
            return 1
        sys.stdout.write(f"### {path.stem}\n\n{text}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
