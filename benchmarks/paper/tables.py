"""Tables of results as CSV, Markdown and LaTeX, each with the machine it was measured on. It computes nothing.

`python -m benchmarks.paper.tables RESULT.json --out FOLDER` writes them again from a result.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import machine_line

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns. A float is written with two decimals; None is a figure that there is not: "not run".

    `name` makes the file's name. `note` says how it was measured.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def markdown(table: Table, machine: str) -> str:
    lines = [f"**{table.title}**", "", _row(table.columns), "|" + "---|" * len(table.columns)]
    lines += [_row([_text(cell) for cell in row]) for row in table.rows]
    return "\n".join([*lines, "", *([table.note, ""] if table.note else []), machine, ""])


def latex(table: Table, machine: str) -> str:
    """A table environment that needs the package booktabs."""
    head = " & ".join(map(_escape, table.columns))
    rows = [" & ".join(_escape(_text(cell)) for cell in row) + r" \\" for row in table.rows]
    caption = " ".join(part for part in (f"{table.title}.", table.note, f"{machine}.") if part)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: Table, machine: str) -> str:
    """Figures with all their digits; the title, the note and the machine stand before them as comments."""
    text = io.StringIO()
    for line in (table.title, table.note, machine):
        if line:
            text.write(f"# {line}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["not run" if cell is None else cell for cell in row] for row in table.rows])
    return text.getvalue()


WRITERS = {"csv": comma_separated, "md": markdown, "tex": latex}


def write_tables(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes every table of a result in every form; returns the paths. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = machine_line(result["environment"])
    paths = []
    for raw in result["results"]["tables"]:
        table = Table(**raw)
        for suffix, write in WRITERS.items():
            path = folder / f"{table.name}.{suffix}"
            path.write_text(write(table, machine), encoding="utf-8")
            paths.append(path)
    return paths


def all_markdown(result: dict[str, Any]) -> str:
    """Every table of a result, one after the other."""
    machine = machine_line(result["environment"])
    return "\n".join(markdown(Table(**raw), machine) for raw in result["results"]["tables"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(cell: Cell) -> str:
    if cell is None:
        return "not run"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _escape(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, "\\" + character)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables of results again.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    for path in arguments.results:
        for written in write_tables(json.loads(path.read_text(encoding="utf-8")), arguments.out):
            sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
