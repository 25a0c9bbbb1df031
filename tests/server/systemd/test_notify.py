"""Messages to the service manager, as a socket in its place hears them."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotgraph_server.systemd import Notifier


class Manager:
    """What the service manager hears."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self._socket.settimeout(5)

    def heard(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().split("\n"))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        path = f"@hotgraph-test-{os.getpid()}" if request.param == "abstract" else f"{folder}/notify"
        running = Manager(path)
        yield running
        running.close()


@contextmanager
def notifier(manager: Manager, **environment: str) -> Iterator[Notifier]:
    told = Notifier.from_environment({"NOTIFY_SOCKET": manager.path, **environment})
    yield told
    told.close()
    told.alive()  # to nobody


def test_messages(manager: Manager) -> None:
    """Each message has the fields that systemd documents for it."""
    with notifier(manager) as told:
        told.ready("serving m")
        assert manager.heard() == {"READY": "1", "STATUS": "serving m"}
        told.status("two\nlines")
        assert manager.heard() == {"STATUS": "two lines"}
        told.alive()
        assert manager.heard() == {"WATCHDOG": "1"}
        told.stopping("draining", 1.5)
        assert manager.heard() == {"STOPPING": "1", "STATUS": "draining", "EXTEND_TIMEOUT_USEC": "1500000"}
        told.extend(60)
        assert manager.heard() == {"EXTEND_TIMEOUT_USEC": "60000000"}
        told.failed("taken", 98)
        assert manager.heard() == {"STATUS": "taken", "ERRNO": "98"}
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        told.reloading()
        heard = manager.heard()
        assert heard.pop("RELOADING") == "1"
        assert before <= int(heard.pop("MONOTONIC_USEC")) <= before + 5_000_000
        assert heard == {}


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_time(manager: Manager, environment: dict[str, str], seconds: float | None) -> None:
    """The watchdog's time is the manager's, if it watches this process."""
    with notifier(manager, **environment) as told:
        assert told.watchdog_seconds == seconds


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}])
def test_nobody_listens(environment: dict[str, str]) -> None:
    """Without a manager nothing is sent, and nothing fails."""
    told = Notifier.from_environment(environment)
    assert not told.is_listened_to
    told.ready("x")
    told.alive()
    told.close()


def test_manager_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manager that does not listen costs one warning, however often it is told something."""
    told = Notifier(str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            told.alive()
    told.close()
    assert len(caplog.records) == 1
