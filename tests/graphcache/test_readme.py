"""The README's example is a file that is tested, and its table names every file, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import graphcache
from graphcache import EagerBackend, GraphState
from graphcache.example import Served

FOLDER = Path(graphcache.__file__).parent
README = FOLDER / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_is_the_tested_file() -> None:
    """The README's first block of Python is example.py, word for word."""
    assert python_blocks()[0] == (FOLDER / "example.py").read_text(encoding="utf-8")


def test_the_use_of_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The block after it runs behind it as it stands, and prints what it says it prints."""
    example, use = python_blocks()
    promised = [line.split("  # prints ")[1] for line in use.splitlines() if "  # prints " in line]
    exec(compile(example + use, str(README), "exec"), {"__name__": "readme"})
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_the_example_gives_what_the_module_gives() -> None:
    """Through hits and misses, eagerly on the CPU, every call gives the module's own result for its input."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 16)).eval()
    served = Served(module, torch.zeros(6, 16), EagerBackend())
    served.cache.start()
    try:
        for repeat in range(3):
            for rows in range(1, 7):
                x = torch.randn(rows, 16)
                torch.testing.assert_close(served(x), module(x).detach())
            if repeat == 0:
                infos = served.cache.wait(range(1, 7), 60.0)
                assert {info.state for info in infos} == {GraphState.READY}
        stats = served.cache.stats()
        assert (stats.num_hits, stats.num_misses) == (12, 6)
        for rows in range(1, 7):
            assert served.verify(rows, served.bind(rows))
            assert not served.verify(rows, lambda: served.outputs.zero_())
    finally:
        served.cache.close()


def test_the_readme_names_every_file() -> None:
    """Every module of the package has its line in the README's table."""
    text = README.read_text(encoding="utf-8")
    for path in FOLDER.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.relative_to(FOLDER).as_posix()}`" in text


def test_the_readme_names_every_setting() -> None:
    """Every field of CacheSettings has its row in the table of settings, with its default."""
    text = README.read_text(encoding="utf-8")
    for name, field in graphcache.CacheSettings.__dataclass_fields__.items():
        default = "1 GiB" if field.default == 1 << 30 else str(field.default)
        assert re.search(rf"^\| `{name}` \| {re.escape(default)} \|", text, re.MULTILINE), name
