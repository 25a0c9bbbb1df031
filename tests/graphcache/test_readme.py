"""The README's example is run, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graphcache

README = Path(graphcache.__file__).parent / "README.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The first Python block of the README runs as it stands and prints what it says it prints."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    promised = [line.split("  # prints ")[1] for line in blocks[0].splitlines() if "  # prints " in line]
    exec(compile(blocks[0], str(README), "exec"), {"__name__": "readme"})
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_the_readme_names_every_file() -> None:
    """Every module of the package has its line in the README's table."""
    text = README.read_text(encoding="utf-8")
    for path in README.parent.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.relative_to(README.parent).as_posix()}`" in text
