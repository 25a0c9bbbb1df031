"""Every way a command can fail: one line on standard error, no traceback, and the right exit status."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hotgraph_client import errors as client_errors
from hotgraph_server import errors as server_errors
from hotgraph_server.cli import status
from hotgraph_server.cli.connection import ConnectionOptions
from hotgraph_server.cli.failures import CommandError, ExitStatus, describe
from tests.server.cli.conftest import Run

VIOLATIONS = (client_errors.Violation("top_k", "too large"), client_errors.Violation("seed", "missing"))

CASES: list[tuple[BaseException, int, str]] = [
    (
        client_errors.InvalidRequestError("top_k: too large", reason="INVALID_REQUEST", violations=VIOLATIONS),
        1,
        "top_k: too large; seed: missing [INVALID_REQUEST]",
    ),
    (client_errors.ContextLengthError("too long", reason="CONTEXT_LENGTH"), 1, "too long [CONTEXT_LENGTH]"),
    (client_errors.GraphNotFoundError("no graph", reason="GRAPH_NOT_FOUND"), 1, "no graph [GRAPH_NOT_FOUND]"),
    (client_errors.UnauthenticatedError("no token", reason="UNAUTHENTICATED"), 1, "no token [UNAUTHENTICATED]"),
    (
        client_errors.QueueFullError("full", reason="QUEUE_FULL", retry_after_seconds=1.25),
        75,
        "full (try again in 1.25 s) [QUEUE_FULL]",
    ),
    (client_errors.LoadingError("loading", reason="LOADING"), 75, "loading [LOADING]"),
    (client_errors.DrainingError("draining", reason="DRAINING"), 75, "draining [DRAINING]"),
    (client_errors.EngineFailedError("failed", reason="ENGINE_FAILED"), 75, "failed [ENGINE_FAILED]"),
    (client_errors.GraphNotReadyError("soon", reason="GRAPH_NOT_READY"), 75, "soon [GRAPH_NOT_READY]"),
    (
        client_errors.UnavailableError("refused"),
        69,
        "no daemon answers: refused; hotgraph serve starts one, --target says where it is",
    ),
    (client_errors.StreamLostError("reset"), 69, "the daemon was lost: reset"),
    (client_errors.DeadlineError("time is over", reason="DEADLINE_EXCEEDED"), 1, "time is over [DEADLINE_EXCEEDED]"),
    (client_errors.InternalError("internal error", reason="INTERNAL"), 1, "internal error [INTERNAL]"),
    (client_errors.HotgraphError("odd"), 1, "odd"),
    (client_errors.HotgraphError("two\nlines\x1b[31m"), 1, "two"),
    (server_errors.SettingsError("no such setting"), 78, "no such setting"),
    (server_errors.ModelLoadError("no such model"), 78, "no such model"),
    (server_errors.AddressInUseError("taken"), 69, "taken"),
    (server_errors.QueueFullError("full", retry_after_seconds=1.0), 75, "full [QUEUE_FULL]"),
    (server_errors.NotPossibleError("cannot"), 1, "cannot [NOT_POSSIBLE]"),
    (CommandError("give up"), 1, "give up"),
    (CommandError("later", ExitStatus.TRY_LATER), 75, "later"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that wants a client gets the error instead."""

    def client(_: ConnectionOptions) -> NoReturn:
        raise error

    monkeypatch.setattr(ConnectionOptions, "client", client)


@pytest.mark.parametrize(("error", "exit_status", "line"), CASES, ids=lambda case: type(case).__name__)
def test_errors(error: BaseException, exit_status: int, line: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is told in words with its reason, its fields and when to come back, and maps to its exit status."""
    fail_with(error, monkeypatch)
    ran = run("status")
    assert ran.status == exit_status
    assert ran.stderr.splitlines()[0] == f"hotgraph: {line}"
    assert ran.stdout == ""
    assert "\x1b" not in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "hello"],
        ["generate", "hello", "--json"],
        ["generate", "hello", "--no-stream"],
        ["tokenize", "hello"],
        ["tokenize", "1", "--decode"],
        ["status"],
        ["status", "--watch", "--json"],
        ["drain"],
        ["model", "list", "--served"],
        ["model", "show", "--served"],
        ["graphs", "list"],
        ["graphs", "get", "t1-r1-greedy"],
        ["graphs", "watch"],
        ["graphs", "prewarm", "t1-r1-greedy"],
        ["graphs", "pin", "t1-r1-greedy"],
        ["graphs", "unpin", "t1-r1-greedy"],
        ["graphs", "evict", "t1-r1-greedy"],
        ["graphs", "budget"],
        ["graphs", "budget", "--limit", "1GiB"],
        ["graphs", "profile", "export"],
    ],
    ids=" ".join,
)
def test_every_client_command_reports_the_same_way(command: list[str], run: Run, tmp_path: Path) -> None:
    """Where no daemon is, every client command says so in one line and exits with 69."""
    ran = run(*command, "--target", f"unix:{tmp_path}/none.sock")
    assert ran.status == 69, ran
    assert ran.stderr.startswith("hotgraph: no daemon answers")
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_our_own_mistakes_leave_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected is one line that names a file with the traceback."""
    fail_with(ZeroDivisionError("division by zero"), monkeypatch)
    ran = run("status")
    assert ran.status == 70
    found = re.fullmatch(
        r"hotgraph: internal error: ZeroDivisionError: division by zero; details are in (.+\.log)\n", ran.stderr
    )
    assert found is not None
    details = Path(found[1])
    assert "Traceback" in details.read_text(encoding="utf-8")
    details.unlink()


def test_a_reader_that_left_is_no_error_of_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the reader of a pipe is gone, the command ends without a word."""

    def look(*_: Any) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(status, "_look", look)
    ran = run("status", "--json")
    assert ran.status == 1
    assert ran.stderr == ""


def test_the_traceback_is_only_written_for_unknown_errors() -> None:
    """A known error writes no file."""
    assert describe(CommandError("x")) == (ExitStatus.FAILED, "x")


def test_credentials_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    """A token or certificate file that is not there is told by name."""
    ran = run("status", "--token-file", str(tmp_path / "token"))
    assert ran.status == 78
    assert ran.stderr == f"hotgraph: the token file {tmp_path}/token cannot be read: No such file or directory\n"
    assert run("status", HOTGRAPH_TLS_CA=str(tmp_path / "ca.pem")).status == 78


def test_credentials_that_do_not_go_together(run: Run, tmp_path: Path) -> None:
    """A certificate without its key is wrong usage."""
    ran = run("status", "--tls-cert", str(tmp_path / "cert.pem"))
    assert ran.status == 2
    assert "--tls-cert and --tls-key go together" in ran.stderr


@pytest.mark.parametrize("target", ["", "unix:", "nonsense"])
def test_targets_that_are_none(target: str, run: Run) -> None:
    """A target nobody can be behind is told without a traceback."""
    ran = run("status", "--target", target, "--timeout", "2s")
    assert ran.status in (2, 69)
    assert "internal error" not in ran.stderr


def test_unknown_commands_are_answered_with_the_nearest(run: Run) -> None:
    """A mistyped command names the one that was meant."""
    ran = run("serv")
    assert ran.status == 2
    assert "Did you mean 'serve'?" in ran.stderr
