"""What a language's tests reported, as files, and the tables that docs/clients.md shows of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "clients.md"
BEGIN, END = "<!-- made by python -m tests.interop --record -->", "<!-- end -->"

CASES: dict[str, str] = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Result:
    """language and library: name and version each, as the tests told them. passed: cases in the order of the list."""

    language: str
    library: str
    passed: tuple[str, ...]

    def write(self, name: str) -> None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_report(text: str) -> Result:
    """Reads lines of `language NAME VERSION`, `library NAME VERSION` and `passed CASE`. ValueError for any other."""
    told = {"language": "", "library": ""}
    passed: set[str] = set()
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "passed" and rest in CASES:
            passed.add(rest)
        elif word in told and rest:
            told[word] = rest
        else:
            raise ValueError(f"no line of a report: {line!r}")
    return Result(told["language"], told["library"], tuple(case for case in CASES if case in passed))


def read_results() -> list[Result]:
    """Those that were recorded, by file name."""
    texts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [Result(text["language"], text["library"], tuple(text["passed"])) for text in texts]


def tables(results: list[Result]) -> str:
    """Languages with their versions, then cases by language."""
    lines = ["| language | gRPC library | cases passed |", "|---|---|---|"]
    lines += [f"| {r.language} | {r.library} | {len(r.passed)} of {len(CASES)} |" for r in results]
    names = [result.language.split()[0] for result in results]
    lines += ["", f"| case | what must hold | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for case, text in CASES.items():
        marks = " | ".join("yes" if case in result.passed else "no" for result in results)
        lines.append(f"| {case} | {text} | {marks} |")
    return "\n".join(lines)


def page_with_tables(page: str, results: list[Result]) -> str:
    """The page with the tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def update_page() -> None:
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8"), read_results()), encoding="utf-8")
