"""Puts tables and pictures of results into docs/kernels.md, between its markers: `python -m benchmarks.gpu.page [--check]`.

A marker `<!-- result: NAME -->` or `<!-- result: NAME, PART -->` asks for the tables of results/gpu/NAME.json, or for a part of
them: a step of a breakdown, or `floor` of a latency result. `<!-- picture: NAME -->` asks for docs/pictures/NAME.svg. What
stands up to the next `<!-- end -->` is replaced. Where there is no result the page says so; no figure is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu import breakdown, floor
from benchmarks.gpu.report import machine_line
from benchmarks.pages import write_page

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "kernels.md"
_MARKED = re.compile(r"(<!-- (result|picture): ([\w-]+)(?:, ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path, pictures: Path) -> str:
    """The page with what its markers ask for. results, pictures: folders. Raises ValueError for what no result can have."""

    def fill(found: re.Match[str]) -> str:
        opening, kind, name, part, end = found.groups()
        content = _picture(name, pictures) if kind == "picture" else _result(name, part, results)
        return f"{opening}\n{content}\n\n{end}"

    return _MARKED.sub(fill, text)


def _picture(name: str, pictures: Path) -> str:
    path = pictures / f"{name}.svg"
    return f"![{name}]({pictures.name}/{path.name})" if path.is_file() else "Not measured yet: there is no picture."


def _result(name: str, part: str | None, results: Path) -> str:
    path = results / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: there is no `{name}.json`."
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if part is None:
        return tables.tables(result)
    found = result["results"]
    lines: str
    match result["name"], part:
        case "latency", "floor":
            if "rates" not in found:
                return f"Not measured yet: `{name}.json` has no rates of its own run."
            lines = floor.latency_tables(result, found["rates"])
        case "breakdown", _:
            if part not in found["steps"]:
                return f"Not measured yet: `{name}.json` has no {part}."
            step = breakdown.step_table(part, found["steps"][part], floor.Rates.of(found["rates"]))
            lines = f"{step}\n\n{floor.rates_line(found['rates'])}"
        case _:
            raise ValueError(f"a result of {result['name']} has no part {part!r}")
    return f"{lines}\n\n{machine_line(result['environment'])}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the page is not as its results say (`--check`)."""
    results, pictures = ROOT / "benchmarks" / "results" / "gpu", ROOT / "docs" / "pictures"
    return write_page(argv, PAGE, lambda text: filled(text, results, pictures), module="benchmarks.gpu.page")


if __name__ == "__main__":
    sys.exit(main())
