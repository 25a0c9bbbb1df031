"""The README tells what is there: every file of the packages in its tree, the commands, links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("protos/hotgraph/v1", "graphcache", "clients/python/hotgraph_client", "server/hotgraph_server")


def tree() -> dict[str, str]:
    """Path of every file in the README's tree, and its line."""
    block = README.split("## The house")[1].split("```")[1]
    found: dict[str, str] = {}
    folder = ""
    for line in block.strip().splitlines():
        name, _, text = line.strip().partition(" ")
        if not line.startswith(" ") and name.endswith("/"):
            folder = name
        else:
            found[(folder if line.startswith(" ") else "") + name] = text.strip()
    return found


def files() -> set[str]:
    """Every file of the packages that a reader may look for."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            is_ours = path.suffix in (".py", ".proto") and "_pb2" not in path.name and not path.name.startswith("__")
            if is_ours:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_the_tree_has_a_line_for_every_file() -> None:
    """No file is missing, none is left over, and each has something said of it."""
    lines = tree()
    in_packages = {path for path in lines if path.startswith(PACKAGES)}
    assert in_packages == files()
    assert all(lines.values())


def test_the_two_commands_are_named_first() -> None:
    """A newcomer finds make demo and make test before anything else to run."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    first = re.findall(r"^(make \w+|hotgraph \w+)", blocks, re.MULTILINE)[:2]
    assert first == ["make demo", "make test"]


def test_measured_figures_come_from_the_results() -> None:
    """The tables in the README are the script's, made from the committed samples."""
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for table in re.split(r"^### .*$", output.stdout, flags=re.MULTILINE):
        assert table.strip() in README


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "graphcache/README.md",
        "clients/python/README.md",
        "clients/cpp/README.md",
        "clients/go/README.md",
        "clients/node/README.md",
        "clients/java/README.md",
        "docs/clients.md",
        "docs/paper.md",
        "tests/interop/README.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of the page is a file or folder of the repository."""
    path = ROOT / page
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), target
