"""The page about the paper, from tables that were made up and from those that are there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import page

TEXT = "Before.\n<!-- table: ttft -->\nstale 1.23 ms\n<!-- end -->\n<!-- figure: ttft -->\n<!-- end -->\nAfter.\n"


def test_the_page_is_as_its_results_say() -> None:
    """The page in docs has been written from the results beside it, and from nothing else."""
    assert page.main(["--check"]) == 0


def test_markers_are_filled_and_filled_again(tmp_path: Path) -> None:
    """A table comes in place of what was there, a figure as a link, the text around stays, and again is the same."""
    (tmp_path / "ttft.md").write_text("| a | 4.56 |\n")
    (tmp_path / "ttft.svg").write_text("<svg/>")
    found = page.filled(TEXT, tmp_path, "../results")
    assert "| a | 4.56 |\n\n<!-- end -->" in found
    assert "![ttft](../results/ttft.svg)" in found
    assert "stale" not in found
    assert found.startswith("Before.\n")
    assert found.endswith("After.\n")
    assert page.filled(found, tmp_path, "../results") == found


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Without a result there is no figure, old or new."""
    found = page.filled(TEXT, tmp_path, "../results")
    assert found.count("Not measured yet") == 2
    assert "stale" not in found
