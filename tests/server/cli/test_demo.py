"""`hotgraph demo`: a real daemon as a child, one question, a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hotgraph_server.cli import demo as demo_module
from hotgraph_server.cli.child import ChildDaemon
from hotgraph_server.cli.failures import CommandError, ExitStatus
from tests.server.cli.conftest import COMMAND, Run, clean_environment


def test_demo_from_start_to_end(run: Run, tmp_path: Path) -> None:
    """The question is answered through a daemon that then stops well: answer, timings, receipt and graphs are shown."""
    log = tmp_path / "daemon.log"
    ran = run("demo", "--model", "fake", "--prompt", "Who [are] you?", "-n", "5", "--log-file", str(log))
    assert ran.status == 0, ran
    question, answer = ran.stdout.splitlines()[:2]
    assert question == "You: Who [are] you?"
    assert answer.startswith("Model: ")
    assert len(answer.removeprefix("Model: ")) == 5
    for word in ("queue", "prefill", "TTFT", "TPOT", "5 completion tokens", "Receipt", "Graphs", "t1-r1-greedy"):
        assert word in ran.stdout
    assert "The daemon drained and stopped; its exit status is 0." in ran.stderr
    assert "serving fake" in log.read_text(encoding="utf-8")


def test_it_leaves_nothing_behind(run: Run, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a good run the temporary folder is as it was."""
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    assert run("demo", "--model", "fake", "-n", "2").status == 0
    assert list(short_folder.iterdir()) == []


def test_a_daemon_that_cannot_start(run: Run, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the daemon does not come up, its last lines are shown, its log is kept, and the status is 69."""
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = run("demo", "--model", str(short_folder / "no-model"))
    assert ran.status == 69, ran
    assert "hotgraph: the daemon ended with exit status 78 while it started" in ran.stderr
    (log,) = short_folder.glob("hotgraph-demo-*.log")
    assert f"The last lines of the daemon's log, {log}:" in ran.stderr
    assert "no-model" in ran.stderr


def test_a_refused_question_stops_the_daemon(run: Run, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the question is told as any other, and the daemon is stopped all the same."""
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    ran = run("demo", "--model", "fake", "--max-tokens", "5000")
    assert ran.status == 1
    assert "[CONTEXT_LENGTH]" in ran.stderr


def test_an_embedded_model_is_fetched_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is embedded and not here is pulled before the daemon starts, any other is not."""
    from hotgraph_server.models import registry

    pulled = []
    is_pulled = False

    class Info:
        @property
        def is_pulled(self) -> bool:
            return is_pulled

    monkeypatch.setattr(registry, "info", lambda name: Info())
    monkeypatch.setattr(registry, "pull", lambda name, progress: pulled.append(name))
    demo_module._ensure_model("fake")
    demo_module._ensure_model("smollm2-135m-instruct")
    is_pulled = True
    demo_module._ensure_model("smollm2-135m-instruct")
    assert pulled == ["smollm2-135m-instruct"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_demo_that_is_ended_leaves_no_daemon(number: signal.Signals, status: int, short_folder: Path) -> None:
    """Ctrl-C, SIGTERM or a closed terminal while the daemon starts stop it, too."""
    environment = clean_environment(TMPDIR=str(short_folder))
    command = [*COMMAND, "demo", "--model", "fake", "--log-file", str(short_folder / "log")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert child.stderr is not None
    while b"Starting the daemon" not in child.stderr.readline():
        pass
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == status, errors
    assert b"Traceback" not in errors
    assert list(short_folder.glob("hotgraph-*/")) == []


class StubbornChild(ChildDaemon):
    """A child that is not a daemon."""

    def __init__(self, folder: Path, code: str) -> None:
        super().__init__(folder / "x.sock", [], folder / "log")
        self._command = [COMMAND[0], "-c", code]


WAITS_FOR_SIGTERM_AND_FAILS = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("last words", flush=True)
signal.sigwait([signal.SIGTERM])
sys.exit(3)
"""


def test_a_child_that_ends_badly_after_all_went_well(tmp_path: Path) -> None:
    """An exit status other than 0 is a failure of the demo, too."""

    def enter_and_leave() -> None:
        with StubbornChild(tmp_path, WAITS_FOR_SIGTERM_AND_FAILS):
            deadline = time.monotonic() + 30
            while "last words" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
                os.sched_yield()

    with pytest.raises(CommandError, match="the daemon ended with exit status 3") as caught:
        enter_and_leave()
    assert caught.value.status is ExitStatus.UNAVAILABLE
