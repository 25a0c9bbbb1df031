"""The README's tables of measured figures, from the raw results beside this file: `python benchmarks/tables.py`.

It computes medians of samples that are there and nothing else; a figure that is in no result cannot come out of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    """Writes every table to standard output."""
    result = json.loads((RESULTS / "cpu-comparison.json").read_text())
    sys.stdout.write(comparison_table(result) + "\n")


if __name__ == "__main__":
    main()
