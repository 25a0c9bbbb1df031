"""The operators' smoke script against a real daemon: it passes on a good one however it is reached, and each check can fail."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import make_authority, make_certificate
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


# What the script may need beside grpcurl: the shell that runs it, and coreutils.
TOOLS = ("bash", "base64", "cut", "sleep")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with those programs alone: no python, jq, grep, sed or awk."""
    folder = tmp_path_factory.mktemp("tools")
    for name in TOOLS:
        path = shutil.which(name)
        assert path is not None, name
        (folder / name).symlink_to(path)
    return folder


def smoke(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a service would: nothing in the environment but what is given here."""
    return subprocess.run(
        [str(HERE / "grpcurl.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": os.environ["PATH"], **environment},
    )


def check_passed(done: subprocess.CompletedProcess[str]) -> None:
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith("ok ") for line in lines[:-1]), done.stdout
    assert len(lines) > 50
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_passes(grpcurl: str, tools: Path, tmp_path: Path) -> None:
    """Every check passes on a daemon that serves the embedded model, with nothing but coreutils, and it knows the capital of
    France."""
    # One thread: two that wait for each other are slow beyond measure on a machine that is busy with other tests.
    with daemon(tmp_path, "--num-threads", "1") as running:
        done = smoke(running.unix_target, "--expect-model", "smollm2-135m-instruct", GRPCURL=grpcurl, PATH=str(tools))
    check_passed(done)
    assert "Paris" in done.stderr


@dataclass(frozen=True, slots=True)
class Secrets:
    """Paths of an authority, of certificates below it, of another authority, and of a daemon's and its callers' tokens."""

    folder: Path

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def made() -> Iterator[Secrets]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        folder = Path(path)
        make_authority(folder, "ca")
        make_authority(folder, "other")
        make_certificate(folder, "server")
        make_certificate(folder, "ops", usage="clientAuth", names="DNS:ops.test")
        tokens = {role: secrets.token_urlsafe() for role in ("admin", "use", "wrong")}
        texts = {role: token + "\n" for role, token in tokens.items()}
        texts["tokens"] = f"admin root {tokens['admin']}\nuse alice {tokens['use']}\n"
        for name, text in texts.items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text)
        yield Secrets(folder)


def server_flags(made: Secrets, mode: str) -> list[str]:
    """What the daemon is told in each of the four modes."""
    tls = ["--tls-certificate", made / "server.pem", "--tls-key", made / "server.key"]
    return {
        "plain": [],
        "token": ["--token-file", made / "tokens"],
        "tls and token": [*tls, "--token-file", made / "tokens"],
        "mutual tls": [*tls, "--tls-client-ca", made / "ca.pem", "--tls-admins", "ops.test"],
    }[mode]


def caller_flags(made: Secrets, mode: str) -> dict[str, str]:
    """What a caller has to tell the script then."""
    trust, token = {"--tls-ca": made / "ca.pem"}, {"--token-file": made / "admin"}
    return {
        "plain": {},
        "token": token,
        "tls and token": trust | token,
        "mutual tls": trust | {"--tls-cert": made / "ops.pem", "--tls-key": made / "ops.key"},
    }[mode]


MODES = ("plain", "token", "tls and token", "mutual tls")


@pytest.fixture(scope="module")
def daemons(
    tmp_path_factory: pytest.TempPathFactory, made: Secrets, fake_daemon: Daemon
) -> Iterator[dict[str, Daemon]]:
    """A daemon with the fake engine for each mode."""
    with contextlib.ExitStack() as stack:
        running = {"plain": fake_daemon}
        for mode in MODES[1:]:
            folder = tmp_path_factory.mktemp("daemon")
            running[mode] = stack.enter_context(daemon(folder, "--model", "fake", *server_flags(made, mode)))
        yield running


def flat(flags: dict[str, str]) -> list[str]:
    return [word for flag in flags.items() for word in flag]


def as_variables(flags: dict[str, str]) -> dict[str, str]:
    return {"HOTGRAPH_" + name.removeprefix("--").replace("-", "_").upper(): value for name, value in flags.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("mode", MODES)
def test_all_modes_pass(
    grpcurl: str, tools: Path, made: Secrets, daemons: dict[str, Daemon], mode: str, kind: str
) -> None:
    """Every check passes over the Unix socket and over TCP, with and without TLS, tokens and client certificates; over TCP as
    flags, over the socket as variables, which systemd would set for both."""
    running, flags = daemons[mode], caller_flags(made, mode)
    if kind == "tcp":
        done = smoke(*flat(flags), running.tcp_target, GRPCURL=grpcurl, PATH=str(tools))
    else:
        done = smoke(running.unix_target, GRPCURL=grpcurl, PATH=str(tools), **as_variables(flags))
    check_passed(done)


@pytest.mark.parametrize(
    ("mode", "changed", "what"),
    [
        ("token", {"--token-file": None}, "Unauthenticated"),
        ("token", {"--token-file": "wrong"}, "Unauthenticated"),
        ("tls and token", {"--token-file": "wrong"}, "Unauthenticated"),
        ("tls and token", {"--tls-ca": None}, ""),
        ("tls and token", {"--tls-ca": "other.pem"}, "certificate"),
        ("mutual tls", {"--tls-cert": None, "--tls-key": None}, ""),
    ],
)
def test_who_is_not_let_in_fails(
    grpcurl: str,
    made: Secrets,
    daemons: dict[str, Daemon],
    mode: str,
    changed: dict[str, str | None],
    what: str,
) -> None:
    """Without the token, with a wrong one, without TLS or with another authority the script fails at once and says why."""
    flags = caller_flags(made, mode)
    for name, value in changed.items():
        del flags[name]
        if value is not None:
            flags[name] = made / value
    done = smoke(*flat(flags), daemons[mode].tcp_target, GRPCURL=grpcurl, SMOKE_CONNECT_SECONDS="2")
    assert done.returncode == 1
    assert done.stdout == "FAIL list services\n"
    assert what in done.stderr
    assert "does not let us in" in done.stderr


@pytest.mark.slow
def test_who_is_no_admin_fails(grpcurl: str, made: Secrets, daemons: dict[str, Daemon]) -> None:
    """With a token of the role `use` what only the admin may do fails, and nothing else does."""
    done = smoke("--token-file", made / "use", daemons["token"].tcp_target, GRPCURL=grpcurl)
    assert done.returncode == 1
    failed = failed_checks(done)
    assert {
        "GetStatus",
        "ListClients",
        "PrewarmGraphs",
        "PinGraph",
        "EvictGraph",
        "UpdateBudget, to what it was",
    } <= failed
    assert {"Complete, text", "ListModels", "Generate, receipt", "unknown model"} <= passed_checks(done)
    assert "PermissionDenied" in done.stderr


@pytest.mark.slow
def test_the_admin_may_be_served_elsewhere(grpcurl: str, tmp_path: Path) -> None:
    """With server.admin_listen the checks of the admin's methods pass at --admin-target, and fail without."""
    flags = ("--model", "fake", "--admin-listen", f"unix:{tmp_path}/a")
    with daemon(tmp_path, *flags) as running:
        check_passed(smoke(running.unix_target, "--admin-target", f"unix:{tmp_path}/a", GRPCURL=grpcurl))
        done = smoke(running.unix_target, GRPCURL=grpcurl)
    assert done.returncode == 1
    assert "GetStatus" in failed_checks(done)


@pytest.mark.slow
def test_another_model_or_version_fails(grpcurl: str, fake_daemon: Daemon) -> None:
    """A daemon that serves another model or another version than expected fails that check alone."""
    flags = ("--expect-model", "another", "--expect-version", "0.0.0-none")
    done = smoke(*flags, fake_daemon.unix_target, GRPCURL=grpcurl)
    assert done.returncode == 1
    assert failed_checks(done) == {"the model is another", "the version is 0.0.0-none"}
    assert "model.id is 'fake', not == 'another'" in done.stderr


def test_a_stopped_daemon_fails(grpcurl: str, tmp_path: Path) -> None:
    """A daemon that was there and is stopped fails the script, over either transport."""
    with daemon(tmp_path, "--model", "fake") as running:
        pass
    for target in (running.unix_target, running.tcp_target):
        done = smoke(target, GRPCURL=grpcurl, SMOKE_CONNECT_SECONDS="1")
        assert (done.returncode, done.stdout) == (1, "FAIL list services\n")


def failed_checks(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.removeprefix("FAIL ") for line in done.stdout.splitlines() if line.startswith("FAIL ")}


def passed_checks(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.removeprefix("ok ") for line in done.stdout.splitlines() if line.startswith("ok ")}


def impostor(folder: Path, program: str) -> str:
    """A program to be run as grpcurl. It lets `list` through, without which the script ends; the real one is in REAL."""
    path = folder / "grpcurl"
    path.write_text(f'#!/usr/bin/env bash\n[ "${{*: -1}}" != list ] || exec "$REAL" "$@"\n{program}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "program",
    ["echo '{}'", 'echo "ERROR:"; echo "  Code: Internal"; exit 77', "exit 1", "echo '<html></html>'"],
)
def test_each_check_can_fail(grpcurl: str, fake_daemon: Daemon, tmp_path: Path, program: str) -> None:
    """When every answer is empty, an error, nothing or no JSON, every check fails: none holds of whatever comes."""
    done = smoke(fake_daemon.unix_target, GRPCURL=impostor(tmp_path, program), REAL=grpcurl)
    assert done.returncode == 1
    assert passed_checks(done) == {"list services"}
    assert len(failed_checks(done)) > 50


@pytest.mark.slow
def test_tokens_that_differ_are_found(grpcurl: str, fake_daemon: Daemon, tmp_path: Path) -> None:
    """When tokens change from call to call, the checks that compare calls fail, and those of anything else do not."""
    count = tmp_path / "count"
    count.write_text("")
    # A token id stands alone on its line; each call adds one more than the one before.
    program = f"""echo x >> {count}
added=$(wc -l < {count})
"$REAL" "$@" | while IFS= read -r line; do
    if [[ $line =~ ^(\\ +)([0-9]+)(,?)$ ]]; then line="${{BASH_REMATCH[1]}}$((BASH_REMATCH[2] + added))${{BASH_REMATCH[3]}}"; fi
    printf '%s\\n' "$line"
done
exit ${{PIPESTATUS[0]}}"""
    done = smoke(fake_daemon.unix_target, GRPCURL=impostor(tmp_path, program), REAL=grpcurl)
    assert failed_checks(done) >= {
        "Complete, token ids, as the same text",
        "Complete, the same seed gives the same tokens",
        "Complete, greedy is the likeliest",
        "Complete, log-probabilities change no token",
        "Generate, the tokens of Complete",
        "after all that it answers as before",
    }
    assert {"Complete, text", "GetStatus", "ListGraphs", "unknown graph"} <= passed_checks(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "x"], "there is no --nonsense"),
        (["--tls-ca"], "--tls-ca wants a value"),
        (["--tls-key", "/dev/null"], "--tls-key wants --tls-cert"),
        (["--tls-cert", "/dev/null"], "--tls-cert wants --tls-key"),
        (["--token-file", "/no/such/file"], "cannot be read"),
        (["unix:a", "unix:b"], "one target"),
        (["--token-file", "/dev/null", "192.0.2.1:7070"], "in the clear"),
        (["--token-file", "/dev/null", "--admin-target", "192.0.2.1:7070", "127.0.0.1:1"], "in the clear"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    """What cannot be meant, or would tell a token to the network, ends with 2 before any call."""
    done = smoke(*arguments, GRPCURL=impostor(tmp_path, "echo was asked >&2"), REAL="/bin/false")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "was asked" not in done.stderr


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
    assert done.returncode == 0
    assert "grpcurl.sh [FLAG...] [TARGET]" in done.stdout
    assert "ExecStartPost=" in done.stdout
    assert "pipefail" not in done.stdout


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
