"""Writes a page of docs/ from results, or checks that it is what they say: the command line that such pages share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def write_page(argv: Sequence[str] | None, page: Path, filled: Callable[[str], str], *, module: str) -> int:
    """`filled` makes the new text of the old one. Returns 1 when the page is not as its results say (`--check`)."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Fills docs/{page.name} from results.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the page would change")
    arguments = parser.parse_args(argv)
    before = page.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check:
        if before != after:
            sys.stderr.write(f"{page.name} is not as its results say: python -m {module} writes it\n")
        return int(before != after)
    page.write_text(after, encoding="utf-8")
    return 0
