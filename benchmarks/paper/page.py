"""Puts the tables and figures of the paper's comparison into docs/paper.md: `python -m benchmarks.paper.page [--check]`.

What stands between `<!-- table: NAME -->` and the next `<!-- end -->` becomes benchmarks/results/paper/NAME.md, and after
`<!-- figure: NAME -->` a link to NAME.svg there. Where there is none the page says so; no figure is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "paper.md"
RESULTS = ROOT / "benchmarks" / "results" / "paper"
_MARKED = re.compile(r"(<!-- (table|figure): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path, link: str) -> str:
    """The page with what its markers ask for. results: the folder; link: how the page refers to it."""

    def fill(found: re.Match[str]) -> str:
        opening, kind, name, end = found.groups()
        path = results / f"{name}.{'md' if kind == 'table' else 'svg'}"
        if not path.is_file():
            content = f"Not measured yet: there is no `{path.name}`."
        elif kind == "figure":
            content = f"![{name}]({link}/{path.name})"
        else:
            content = path.read_text(encoding="utf-8").strip()
        return f"{opening}\n{content}\n\n{end}"

    return _MARKED.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the page is not as its results say (`--check`)."""
    parser = argparse.ArgumentParser(description="The page about the paper, with its tables.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the page would change")
    arguments = parser.parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, RESULTS, "../benchmarks/results/paper")
    if arguments.check:
        if before != after:
            sys.stderr.write(f"{PAGE.name} is not as its results say: python -m benchmarks.paper.page writes it\n")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
