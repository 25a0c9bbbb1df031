"""The operators' smoke script against a real daemon: it passes on a good one, and fails on one that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.smoke.daemon_process import Daemon, daemon

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def grpcurl() -> str:
    """The pinned grpcurl, built once for this checkout; GRPCURL names another."""
    if path := os.environ.get("GRPCURL"):
        return path
    done = subprocess.run([str(HERE / "install_grpcurl.sh")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fake_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the fake engine."""
    with daemon(tmp_path_factory.mktemp("fake"), "--model", "fake") as running:
        yield running


def smoke(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HERE / "grpcurl.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def check_passed(done: subprocess.CompletedProcess[str]) -> None:
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith("ok ") for line in lines[:-1]), done.stdout
    assert len(lines) > 40
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_passes(grpcurl: str, tmp_path: Path) -> None:
    """Every check passes on a daemon that serves the embedded model, and it knows the capital of France."""
    # One thread: two that wait for each other are slow beyond measure on a machine that is busy with other tests.
    with daemon(tmp_path, "--num-threads", "1") as running:
        done = smoke(running.unix_target, GRPCURL=grpcurl)
    check_passed(done)
    assert "Paris" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_daemon_passes_over_either_transport(grpcurl: str, fake_daemon: Daemon, kind: str) -> None:
    """Every check passes over the Unix socket and over TCP."""
    target = fake_daemon.unix_target if kind == "unix" else fake_daemon.tcp_target
    check_passed(smoke(target, GRPCURL=grpcurl))


def test_the_target_may_come_from_the_environment(grpcurl: str, tmp_path: Path) -> None:
    """Without an argument HOTGRAPH_TARGET is asked; where no daemon is, the script fails and says so."""
    target = f"unix:{tmp_path}/none.sock"
    done = smoke(GRPCURL=grpcurl, HOTGRAPH_TARGET=target, SMOKE_CONNECT_SECONDS="1")
    assert done.returncode == 1
    assert done.stdout == "FAIL list services\n"
    assert f"no daemon answers at {target}" in done.stderr


def test_without_grpcurl_it_says_what_to_do(tmp_path: Path) -> None:
    """A missing grpcurl is wrong usage, with the way out."""
    done = smoke("unix:x", GRPCURL=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "install_grpcurl.sh" in done.stderr


def test_help() -> None:
    """Asked for help it prints how it is called, from its own first lines."""
    done = smoke("--help")
    assert done.returncode == 2
    assert "tests/smoke/grpcurl.sh [TARGET]" in done.stdout


def test_the_readmes_commands_work(grpcurl: str, fake_daemon: Daemon, tmp_path: Path) -> None:
    """What the README shows of grpcurl and of Python runs as it stands there, beside a socket of that name."""
    (tmp_path / "hotgraph.sock").symlink_to(fake_daemon.unix_target.removeprefix("unix:"))
    readme = (HERE.parents[1] / "README.md").read_text()
    (script,) = (block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "grpcurl" in block)
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(grpcurl).parent}:{os.environ['PATH']}"}
    commands = {"bash": ["bash", "-euc", script], "python": [sys.executable, "-c", program]}
    outputs = {
        name: subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        for name, command in commands.items()
    }
    assert all(done.returncode == 0 for done in outputs.values()), outputs
    assert "hotgraph.v1.InferenceService" in outputs["bash"].stdout
    assert "FINISH_REASON_LENGTH" in outputs["bash"].stdout
    assert outputs["python"].stdout


def test_a_relative_socket_is_found(grpcurl: str, fake_daemon: Daemon) -> None:
    """The script takes a socket's path relative to where it is called, as every other program does."""
    socket = Path(fake_daemon.unix_target.removeprefix("unix:"))
    done = smoke(f"unix:{os.path.relpath(socket)}", GRPCURL=grpcurl)
    check_passed(done)
