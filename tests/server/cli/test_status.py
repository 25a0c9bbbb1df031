"""`hotgraph status` and `hotgraph drain` against a daemon."""

from __future__ import annotations

import json
import signal
import subprocess

from tests.server.cli.conftest import COMMAND, FakeDaemon, Run, clean_environment

STATUS_KEYS = {"version", "state", "start_time", "model", "scheduler", "kv_cache", "graph_cache"}


def test_dashboard(ask: Run) -> None:
    """The dashboard tells state, model, requests, KV blocks and graphs."""
    ran = ask("status")
    assert ran.status == 0, ran
    for word in ("serving", "fake", "running", "0 / 64 (0%)", "KV cache", "16 tokens", "graphs", "eager"):
        assert word in ran.stdout


def test_json(ask: Run) -> None:
    """The status is one object with the documented keys."""
    status = ask("status", "--json").json
    assert status.keys() == STATUS_KEYS
    assert (status["state"], status["model"]) == ("serving", "fake")
    kv_cache = status["kv_cache"]
    parts = (kv_cache["num_free_blocks"], kv_cache["num_cached_blocks"], kv_cache["num_used_blocks"])
    assert sum(parts) == kv_cache["num_blocks"]


def test_clients(ask: Run) -> None:
    """--clients tells who calls."""
    assert ask("generate", "hello", "-n", "2").status == 0
    assert "hotgraph-python" in ask("status", "--clients").stdout
    status = ask("status", "--clients", "--json").json
    assert status.keys() == STATUS_KEYS | {"clients"}
    assert status["clients"][0]["num_requests"] >= 1


def test_watch(daemon: FakeDaemon) -> None:
    """--watch prints again and again, and Ctrl-C ends it well."""
    command = [*COMMAND, "status", "--watch", "--interval", "100ms", "--json", "--target", daemon.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as watch:
        assert watch.stdout is not None
        looks = [json.loads(watch.stdout.readline()) for _ in range(3)]
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=20)
    assert all(look.keys() == STATUS_KEYS for look in looks)
    assert (watch.returncode, errors) == (0, b"")


def test_watch_for_people(daemon: FakeDaemon) -> None:
    """The watched dashboard ends well, too, and stands whole on the output."""
    command = [*COMMAND, "status", "--watch", "--interval", "100ms", "--target", daemon.target]
    environment = clean_environment(TTY_COMPATIBLE="1", FORCE_COLOR="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as watch:
        assert watch.stdout is not None
        shown = b""
        while b"pre-emptions" not in shown:
            shown += watch.stdout.read1(4096)  # type: ignore[attr-defined]  # a BufferedReader, which has it
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=20)
    assert (watch.returncode, errors) == (0, b"")


def test_interval_has_a_floor(run: Run) -> None:
    """Nobody asks a daemon a thousand times a second by mistake."""
    ran = run("status", "--watch", "--interval", "1ms")
    assert ran.status == 2
    assert "--interval is at least 100ms" in ran.stderr


def test_drain(own_daemon: FakeDaemon, run: Run) -> None:
    """A drain is accepted, --wait returns when the daemon is gone, which ends with status 0."""
    ran = run("drain", "--grace", "1s", "--wait", "--json", "--target", own_daemon.target)
    assert ran.status == 0, ran
    assert ran.json.keys() == {"state", "num_requests", "deadline"}
    assert ran.json["state"] == "draining"
    assert own_daemon.process.wait(20) == 0
    assert run("status", "--target", own_daemon.target).status == 69


def test_drain_for_people(own_daemon: FakeDaemon, run: Run) -> None:
    """Without --json the drain is told in a line on standard error."""
    ran = run("drain", "--target", own_daemon.target)
    assert ran.status == 0
    assert "draining: 0 requests left" in ran.stderr
    assert own_daemon.process.wait(20) == 0
