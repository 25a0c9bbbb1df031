"""The examples of the client's README, each run as it stands against a daemon with the fake engine."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.harness import Serving, serving

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
OUTPUTS = [
    r"[a-z]{40}\n40 tokens, length\n",
    r"[a-z]{40} length\n[\d.e-]+ \d+\n",
    r"0 [a-z]{20} -[\d.]+\n1 [a-z]{20} -[\d.]+\n",
    r"[a-z]{21,}\n",
    r"[a-z]{40}\n",
    r"(sampling\.top_p .*\n|max_tokens .*\n){2}",
    r"\(257, 110, .*\) naïve 😀\n\['fake'\] 1024\n(graphs/.*\n)+0 serving\nplanned\n",
    r"",
]


@pytest.fixture
async def daemon() -> AsyncIterator[Serving]:
    async with serving() as served:
        yield served


@pytest.mark.parametrize(("example", "output"), list(zip(EXAMPLES, OUTPUTS, strict=True)), ids=range(len(EXAMPLES)))
async def test_example(daemon: Serving, tmp_path: Path, example: str, output: str) -> None:
    """An example copied from the README runs and prints what it should."""
    target = daemon.daemon.addresses[0].removeprefix("unix:")
    (tmp_path / "hotgraph.sock").symlink_to(target)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"},
    )
    try:
        printed, complaints = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, complaints.decode()
    assert re.fullmatch(output, printed.decode()), printed.decode()
