"""A daemon with the fake engine in a process of its own, the command line run against it, and a stand-in for the client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from typer.testing import CliRunner

from hotgraph_client import Client, Health
from hotgraph_client.errors import DeadlineError, RetryableError
from hotgraph_server.cli.app import app

COMMAND = [sys.executable, "-m", "hotgraph_server.cli"]
START_TIMEOUT_SECONDS = 60.0


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would steer hotgraph, so that a developer's own settings change no test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTGRAPH_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **more}


class Ran:
    """What came of one run."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    def __repr__(self) -> str:
        return f"<status {self.status}\nstdout: {self.stdout}\nstderr: {self.stderr}>"

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, as the console script does."""
    for name in list(os.environ):
        if name.startswith("HOTGRAPH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str, stdin: str | bytes | None = None, **environment: str) -> Ran:
        result = CliRunner().invoke(app, list(arguments), input=stdin, env=environment, prog_name="hotgraph")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return invoke


class FakeDaemon:
    """`hotgraph serve --model fake` as a child process, on a Unix socket."""

    def __init__(self, folder: Path, *flags: str) -> None:
        # Not in pytest's own folder: its path may be too long for a socket.
        self._socket_folder = TemporaryDirectory(prefix="hg-")
        self.socket = Path(self._socket_folder.name) / "hotgraph.sock"
        self.target = f"unix:{self.socket}"
        self.log = folder / "daemon.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", "--model", "fake", "--listen", self.target, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=clean_environment(),
            )

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        with Client(self.target) as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                time.sleep(0.05)  # the pause of a poll with a deadline
                if not self.socket.exists():
                    continue
                try:
                    if client.check_health(timeout=5.0) is Health.SERVING:
                        return
                except (RetryableError, DeadlineError):
                    continue
        raise AssertionError(f"the daemon does not serve: {self.log.read_text()}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal if it still runs. Returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._socket_folder.cleanup()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for a socket's name."""
    with TemporaryDirectory(prefix="hg-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    """One daemon for all tests that only ask it."""
    daemon = FakeDaemon(tmp_path_factory.mktemp("daemon"))
    try:
        daemon.wait_until_serving()
        yield daemon
    finally:
        daemon.end()


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """One daemon for a test that ends it."""
    daemon = FakeDaemon(tmp_path)
    try:
        daemon.wait_until_serving()
        yield daemon
    finally:
        daemon.end()


@pytest.fixture
def ask(run: Run, daemon: FakeDaemon) -> Run:
    """Runs the command line against the shared daemon."""

    def invoke(*arguments: str, stdin: str | bytes | None = None, **environment: str) -> Ran:
        return run(*arguments, stdin=stdin, **{"HOTGRAPH_TARGET": daemon.target, **environment})

    return invoke
