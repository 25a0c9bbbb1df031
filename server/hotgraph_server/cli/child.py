"""A daemon as a child process: started by `hotgraph serve`, waited for through its health service, stopped by SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.output import note
from hotgraph_server.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from hotgraph_client import Client

NUM_LOG_LINES = 20  # shown when it fails
STOP_TIMEOUT_SECONDS = 40.0  # more than the daemon's own grace
_POLL_SECONDS = 0.05
_HEALTH_TIMEOUT_SECONDS = 2.0


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the program as an exception does, so that a child of it is stopped on the way out."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class ChildDaemon:
    """A context: the child lives while it is entered. Leaving it without an error checks that it stopped well."""

    def __init__(self, socket: Path, flags: list[str], log_file: Path) -> None:
        """A daemon that listens on `socket`, a path that does not exist yet, with more flags of `hotgraph serve`."""
        listen = ["--listen", f"unix:{socket}"]
        self._command = [sys.executable, "-m", "hotgraph_server.cli", "serve", *listen, *flags]
        self._socket = socket
        self._log_file = log_file
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log_file.open("wb") as log:
            # A session of its own: a Ctrl-C in this terminal is ours to handle, the child gets one SIGTERM.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = self._stop()
        if status == 0 or isinstance(error, CommandError | KeyboardInterrupt | SystemExit):
            return
        if error is not None:
            self._show_log()
            return
        raise self._failure(f"the daemon ended with {_status_text(status)}")

    def wait_until_serving(self, client: Client, timeout_seconds: float, console: Console) -> float:
        """Returns after how many seconds health said SERVING. Raises CommandError when the child ends or time is over."""
        from rich.status import Status

        process = self._running()
        start = time.monotonic()
        with Status("starting the daemon", console=console) as spinner:
            if not console.is_terminal:
                note("Starting the daemon ...")
            while not self._is_serving(client):
                elapsed_seconds = time.monotonic() - start
                if process.poll() is not None:
                    raise self._failure(f"the daemon ended with {_status_text(process.returncode)} while it started")
                if elapsed_seconds > timeout_seconds:
                    raise self._failure(f"the daemon did not serve within {format_seconds(timeout_seconds)}")
                spinner.update(f"loading the model: {elapsed_seconds:.0f} s")
                time.sleep(_POLL_SECONDS)
        return time.monotonic() - start

    def _is_serving(self, client: Client) -> bool:
        from hotgraph_client.admin_types import Health
        from hotgraph_client.errors import CancelledRequestError, DeadlineError, RetryableError

        # Not asked before it listens: a connection that failed is tried again only after seconds.
        if not self._socket.exists():
            return False
        try:
            return client.check_health(timeout=_HEALTH_TIMEOUT_SECONDS) is Health.SERVING
        except (RetryableError, DeadlineError, CancelledRequestError):  # cancelled: it ended while it answered
            return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the child is not started")
        return self._process

    def _stop(self) -> int:
        """Asks the child to stop, and kills it when it does not within its time. Returns its exit status."""
        process = self._running()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _failure(self, message: str) -> CommandError:
        self._show_log()
        return CommandError(message, ExitStatus.UNAVAILABLE)

    def _show_log(self) -> None:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        note(f"The last lines of the daemon's log, {self._log_file}:")
        for line in lines[-NUM_LOG_LINES:]:
            note(f"  {line}")


def _status_text(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
