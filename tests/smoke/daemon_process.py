"""A real daemon in a process of its own, for tests that are callers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon: its socket, and the address it also listens on over TCP."""

    unix_target: str
    tcp_target: str


@contextmanager
def daemon(folder: Path, *flags: str) -> Iterator[Daemon]:
    """Starts `hotgraph serve`, waits until it serves, and stops it; it must end well."""
    target = f"unix:{folder}/h.sock"
    log = folder / "daemon.log"
    command = [sys.executable, "-m", "hotgraph_server.cli", "serve", "--listen", target, "--listen", "127.0.0.1:0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--log-format", "json", *flags], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        text = _wait_for(process, log, r"serving .* after ")
        address = re.search(r"127\.0\.0\.1:\d+", text)
        assert address is not None, text
        yield Daemon(target, address.group())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """The log once it holds the pattern. Fails when the process ends before, or after four minutes."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text()
        if re.search(pattern, text):
            return text
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(f"not within {START_SECONDS:.0f} s: {log.read_text()}")
