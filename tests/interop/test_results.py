"""Reports of clients' tests are read as they say, and docs/clients.md shows what was recorded."""

from __future__ import annotations

import re

import pytest

from tests.interop.results import BEGIN, CASES, END, PAGE, Result, page_with_tables, read_report, read_results, tables


def test_a_report_is_read() -> None:
    """Names, versions and cases, in the order of the list."""
    first, second = list(CASES)[:2]
    result = read_report(f"language Go 1.26\npassed {second}\nlibrary grpc-go 1.85\npassed {first}\n")
    assert result == Result("Go 1.26", "grpc-go 1.85", (first, second))


@pytest.mark.parametrize("line", ["passed none", "language", "failed stream", ""])
def test_an_unknown_line_is_an_error(line: str) -> None:
    """A misspelt case is not lost in silence."""
    with pytest.raises(ValueError, match="no line of a report"):
        read_report(line + "\n")


def test_the_page_shows_what_was_recorded() -> None:
    """The tables are those of results/, which name cases that there are."""
    page = PAGE.read_text(encoding="utf-8")
    results = read_results()
    assert results
    assert page_with_tables(page, results) == page
    assert all(set(result.passed) <= set(CASES) for result in results)


def test_a_case_that_did_not_pass_shows() -> None:
    """One that was not reported is a no in the table."""
    text = tables([Result("C 1", "grpc 2", tuple(CASES)[1:])])
    assert re.search(rf"\| {next(iter(CASES))} \|.*\| no \|", text)
    assert f"{len(CASES) - 1} of {len(CASES)}" in text
    assert page_with_tables(f"a{BEGIN}b{END}c", []).startswith(f"a{BEGIN}\n")
