"""A real Prometheus that scrapes a daemon and evaluates our rules, in seconds where an operator's takes minutes.

Its programs are those that `tests/smoke/install_prometheus.sh` finds or fetches.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import eventually

ROOT = Path(__file__).parents[2]
FILES = ROOT / "server/hotgraph_server/observability/files"
PATIENCE_SECONDS = 60.0


def _find(name: str) -> str | None:
    """The program that was fetched, for that is done where the one on PATH is missing or too old; else the one on PATH."""
    return shutil.which(name, path=f"{ROOT}/.tools/bin") or shutil.which(name)


PROMETHEUS, PROMTOOL = _find("prometheus"), _find("promtool")
needs_prometheus = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="prometheus and promtool are neither on PATH nor in .tools/bin"
)


def promtool(*arguments: str | Path) -> str:
    assert PROMTOOL is not None
    command = [PROMTOOL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """A server that scrapes once a second, which leaves a loaded machine time to answer, and evaluates four times."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _get(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {query}: {error.read().decode()}") from None

    async def is_ready(self) -> bool:
        def ask() -> bool:
            try:
                with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=10):
                    return True
            except urllib.error.HTTPError:
                return False

        return await asyncio.to_thread(ask)

    async def query(self, expression: str) -> list[Any]:
        found: list[Any] = (await asyncio.to_thread(self._get, "query", query=expression))["result"]
        return found

    async def label_values(self, label: str, series: str) -> list[str]:
        """The values of a label of these series, as a dashboard asks for those of a variable."""
        found: list[str] = await asyncio.to_thread(self._get, f"label/{label}/values", **{"match[]": series})
        return found

    async def firing(self) -> set[str]:
        alerts = (await asyncio.to_thread(self._get, "alerts"))["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@asynccontextmanager
async def prometheus(folder: Path, *targets: str) -> AsyncIterator[Prometheus]:
    """Our rules, with times of seconds for minutes: nobody waits for five of those in a test."""
    rules = (FILES / "hotgraph-alerts.yml").read_text()
    rules = re.sub(r"for: \d+m", "for: 0s", rules)
    rules = re.sub(r"\[\d+[mh]\]", "[20s]", rules)
    (folder / "rules.yml").write_text(rules)
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "250ms"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "hotgraph", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(configuration))
    log = folder / "log"
    assert PROMETHEUS is not None
    with log.open("w") as stderr:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:0",
            stderr=stderr,
        )
        try:

            def listening() -> str | None:
                found = re.search(r"Listening on\W+(?:address=)?([\d.]+:\d+)", log.read_text())
                return found and found[1]

            address = await eventually(lambda: listening() or process.returncode is not None, PATIENCE_SECONDS)
            assert isinstance(address, str), log.read_text()
            server = Prometheus(address)
            await eventually(server.is_ready, PATIENCE_SECONDS)  # it listens before it has read its files
            yield server
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def fires(server: Prometheus, *names: str) -> bool:
    async def are_firing() -> bool:
        return set(names) <= await server.firing()

    found: bool = await eventually(are_firing, PATIENCE_SECONDS)
    return found
