"""How the command line starts: fast, and with as little installed as a command needs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hotgraph_server.cli.lazy import RootGroup, lazy_command
from tests.server.cli.conftest import COMMAND, FakeDaemon, Run, clean_environment

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "uvloop", "structlog", "hotgraph_server.config")
MAX_HELP_SECONDS = 0.5  # of processor time, which is what a busy machine does not stretch much

# A module that cannot be imported reads as not installed.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
sys.argv = {argv!r}
from hotgraph_server.cli import main
main()
"""


def without(names: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the console script where the named packages are not installed."""
    code = WITHOUT.format(names=names, argv=["hotgraph", *arguments])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), check=False, timeout=60
    )


@pytest.mark.parametrize("missing", [["typer"], ["rich"], ["typer", "rich"]])
def test_base_install_says_what_to_install(missing: list[str]) -> None:
    """With the base install alone the console script says which extra it needs, whatever was asked."""
    for arguments in ([], ["serve"], ["--help"]):
        ran = without(missing, *arguments)
        assert ran.returncode == 69
        assert ran.stderr == "hotgraph: the command line is not installed: pip install 'hotgraph[cli]'\n"


SERVER_PACKAGES = ["torch", "transformers", "uvloop", "structlog", "platformdirs", "safetensors", "tokenizers", "numpy"]


@pytest.mark.parametrize(
    "arguments", [["serve"], ["demo"], ["tune"], ["model", "pull"], ["model", "list"], ["model", "show"]]
)
def test_cli_install_says_what_serving_needs(arguments: list[str]) -> None:
    """With the command line installed but not the server, what runs models says which extra it needs."""
    ran = without(SERVER_PACKAGES, *arguments)
    assert ran.returncode == 69
    assert "pip install 'hotgraph[server]'" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_missing_packages_of_a_lazy_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose module cannot be imported names the package; a part of ours that is missing is our mistake."""
    (tmp_path / "lazily_loaded.py").write_text("import surely_absent\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    app = typer.Typer(cls=RootGroup)
    app.command("one", cls=lazy_command("lazily_loaded:anything"))(lambda: None)
    app.command("two", cls=lazy_command("hotgraph_server.absent:anything"))(lambda: None)
    ran = CliRunner().invoke(app, ["one"])
    assert ran.exit_code == 69
    assert (
        "hotgraph one needs more than is installed: pip install 'hotgraph[server]' (missing: surely_absent)"
        in ran.stderr
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert CliRunner().invoke(app, ["two"]).exit_code == 70


def test_client_commands_work_without_the_server(daemon: FakeDaemon) -> None:
    """With the command line installed but not the server, client commands do all they do."""
    target = ("--target", daemon.target)
    for arguments in (["generate", "hello", "-n", "3"], ["status"], ["graphs", "list"], ["model", "list", "--served"]):
        ran = without([*SERVER_PACKAGES, "grpc_health", "grpc_reflection"], *arguments, *target)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_client_commands_load_nothing_heavy(daemon: FakeDaemon) -> None:
    """No client command imports torch, transformers or the daemon's settings."""
    commands = [
        ["generate", "hello", "-n", "3", "--stats"],
        ["chat", "-n", "3"],
        ["tokenize", "hello"],
        ["status", "--clients"],
        ["graphs", "list"],
        ["graphs", "prewarm", "t2-r2-greedy"],
        ["graphs", "profile", "export"],
        ["model", "list", "--served"],
        ["version"],
    ]
    code = (
        "import json, sys\n"
        "from hotgraph_server.cli.app import app\n"
        f"for command in {commands!r}:\n"
        "    app(command, standalone_mode=False)\n"
        f"sys.stderr.write(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    environment = clean_environment(HOTGRAPH_TARGET=daemon.target)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input="hi\n",
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stderr.splitlines()[-1]) == []


def test_help_loads_no_grpc() -> None:
    """The overview of commands needs neither gRPC nor pydantic's models of the settings."""
    code = (
        "import sys\n"
        "from hotgraph_server.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "sys.exit(bool({'grpc', 'torch', 'hotgraph_client', 'hotgraph_server.config'} & sys.modules.keys()))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=clean_environment(), check=False, timeout=60
    )
    assert ran.returncode == 0


def test_help_is_fast() -> None:
    """`hotgraph --help` takes less than half a second of processor time."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, "--help"], stdout=subprocess.DEVNULL, env=clean_environment(), check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < MAX_HELP_SECONDS, seconds


def test_help_reads_well(run: Run) -> None:
    """The overview groups the commands, in order, each with a sentence."""
    ran = run("--help")
    assert ran.status == 0
    words = ["Ask the model", "│ demo", "│ generate", "│ chat", "│ tokenize"]
    words += ["Run the daemon", "│ serve", "│ status", "│ drain", "Models and graphs", "│ model", "│ graphs"]
    words += ["Measure and inform", "│ bench", "│ version", "Exit status"]
    places = [ran.stdout.index(word) for word in words]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "generate", "chat", "tokenize", "serve", "status", "drain", "bench", "version", "model pull"),
        *("model list", "model show", "graphs list", "graphs get", "graphs watch", "graphs prewarm", "graphs pin"),
        *("graphs unpin", "graphs evict", "graphs budget", "graphs profile export", "graphs profile import"),
    ],
)
def test_every_command_has_help(command: str, run: Run) -> None:
    """Every command explains itself and ends with status 0."""
    ran = run(*command.split(), "--help")
    assert ran.status == 0
    assert f"Usage: hotgraph {command}" in ran.stdout
    assert ran.stderr == ""


def test_no_arguments_is_help(run: Run) -> None:
    """Without a command the overview is shown."""
    assert "Usage: hotgraph" in run().stdout


def test_version(run: Run) -> None:
    """The version is printed for people and for programs."""
    assert run("--version").stdout.startswith("hotgraph ")
    versions = run("version", "--json").json
    assert versions.keys() == {"hotgraph", "python", "platform", "packages"}
    assert versions["packages"]["grpcio"] is not None
    assert "grpcio" in run("version").stdout


def test_a_pipe_that_closes_early() -> None:
    """A reader that takes one line and leaves makes no noise."""
    read, write = os.pipe()
    os.close(read)
    try:
        ran = subprocess.run(
            [*COMMAND, "version"],
            stdout=write,
            stderr=subprocess.PIPE,
            env=clean_environment(),
            check=False,
            timeout=60,
        )
    finally:
        os.close(write)
    assert ran.returncode == 1
    assert ran.stderr == b""
