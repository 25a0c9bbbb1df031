"""Puts the tables and figures of the paper's comparison into docs/paper.md: `python -m benchmarks.paper.page [--check]`.

What stands between `<!-- table: NAME -->` and the next `<!-- end -->` becomes benchmarks/results/paper/NAME.md, and after
`<!-- figure: NAME -->` a link to NAME.svg there. Where there is none the page says so; no figure is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import write_page

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
    return write_page(
        argv, PAGE, lambda text: filled(text, RESULTS, "../benchmarks/results/paper"), module="benchmarks.paper.page"
    )


if __name__ == "__main__":
    sys.exit(main())
