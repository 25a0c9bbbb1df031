"""The wheel, as a user gets it: built from a clean copy, installed without extras, with either protobuf that is allowed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.smoke.daemon_process import Daemon, daemon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
UNIT_FILES = "server/hotgraph_server/systemd/files"

IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
import google.protobuf, hotgraph.v1, hotgraph_client
for package in (hotgraph.v1, hotgraph_client):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
assert importlib.util.find_spec("torch") is None
assert not {"numpy", "rich", "typer", "hotgraph_server"} & set(sys.modules), sys.modules
assert hotgraph.v1.generation_pb2.SamplingParams(temperature=0).HasField("temperature")
print(google.protobuf.__version__)
"""

CALL_A_DAEMON = """
import asyncio, sys
from hotgraph_client import AsyncClient, Client, Finished, InvalidRequestError
with Client(sys.argv[1]) as client:
    answer = client.complete("Hello", max_tokens=5, temperature=0, ignore_eos=True)
    assert len(answer.token_ids) == 5
    try:
        client.complete("Hello", temperature=-1)
    except InvalidRequestError as error:
        assert error.violations
    else:
        raise AssertionError("not refused")
async def stream():
    async with AsyncClient(sys.argv[1]) as client, client.generate("Hello", max_tokens=5, temperature=0) as generation:
        return [event async for event in generation]
assert isinstance(asyncio.run(stream())[-1], Finished)
"""


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Nothing of this checkout may be found by what is installed.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


def run_well(*command: str | Path, folder: Path | None = None) -> str:
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout's own files, as a clean clone would build it: without stubs or anything else git ignores."""
    source = tmp_path_factory.mktemp("source")
    listed = run_well("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file that is deleted but not committed is still listed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    assert not list(source.rglob("*_pb2*"))
    folder = tmp_path_factory.mktemp("wheel")
    run_well(sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder=source)
    (path,) = folder.glob("*.whl")
    return path


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *requirements: str | Path) -> None:
        run_well(self.python, "-m", "pip", "install", "--quiet", *requirements)


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with the wheel and what it needs, and no extra."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    environment = Environment(folder)
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def fake_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the fake engine, of this checkout."""
    with daemon(tmp_path_factory.mktemp("daemon"), "--model", "fake") as running:
        yield running


def test_what_the_wheel_holds(wheel: Path) -> None:
    """The stubs with their types, the four packages, the license and the console script are in; tests and tools are not."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
        entry_points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    for proto in sorted((ROOT / "protos/hotgraph/v1").glob("*.proto")):
        stem = f"hotgraph/v1/{proto.stem}"
        assert {f"{stem}_pb2.py", f"{stem}_pb2.pyi", f"{stem}_pb2_grpc.py", f"{stem}_pb2_grpc.pyi"} <= names
    for package in ("hotgraph", "hotgraph_client", "hotgraph_server", "graphcache"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "hotgraph = hotgraph_server.cli:main" in entry_points
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "graphcache",
        "hotgraph",
        "hotgraph_client",
        "hotgraph_server",
    }
    sources = {
        str(path.relative_to(folder.parent))
        for folder in (ROOT / "server/hotgraph_server", ROOT / "clients/python/hotgraph_client", ROOT / "graphcache")
        for path in folder.rglob("*.py")
    }
    assert sources <= names
    units = {f"hotgraph_server/systemd/files/{path.name}" for path in (ROOT / UNIT_FILES).iterdir()}
    assert len(units) > 5
    assert units <= names
    monitoring = {"hotgraph-alerts.yml", "hotgraph-dashboard.json", "prometheus.yml"}
    assert {f"hotgraph_server/observability/files/{name}" for name in monitoring} <= names
    required = metadata.get_all("Requires-Dist", [])
    needed = sorted(re.split(r"[<>=;\[ ]", line)[0] for line in required if "extra ==" not in line)
    assert needed == ["googleapis-common-protos", "grpcio", "protobuf"]


@pytest.mark.parametrize("major", ["6", "7"])
def test_the_client_imports(base: Environment, major: str, tmp_path: Path) -> None:
    """Without torch and with either major version of protobuf, every module of the client and the contract imports."""
    base.install(f"protobuf=={major}.*")
    version = run_well(base.python, "-W", "error", "-c", IMPORT_EVERYTHING, folder=tmp_path).strip()
    assert version.startswith(f"{major}.")
    run_well(base.python, "-m", "pip", "check")


@pytest.mark.parametrize("major", ["6", "7"])
def test_the_client_calls_a_daemon(base: Environment, major: str, fake_daemon: Daemon, tmp_path: Path) -> None:
    """From the base install the client completes, streams, and turns a refusal into its error."""
    base.install(f"protobuf=={major}.*")
    run_well(base.python, "-W", "error", "-c", CALL_A_DAEMON, fake_daemon.unix_target, folder=tmp_path)


def test_the_console_script_says_what_to_install(base: Environment, tmp_path: Path) -> None:
    """In the base install `hotgraph` names the extra that brings the command line, and fails without a traceback."""
    done = run(base.folder / "bin" / "hotgraph", "status", folder=tmp_path)
    assert done.returncode != 0
    assert "hotgraph[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_says_what_to_install(base: Environment, wheel: Path, tmp_path: Path) -> None:
    """With the cli extra alone the commands run, and the ones that need more name the server extra."""
    base.install(f"{wheel}[cli]")  # the last test: it changes the environment that the others share
    assert "Usage: hotgraph" in run_well(base.folder / "bin" / "hotgraph", "--help", folder=tmp_path)
    for command in (["serve"], ["demo"], ["bench"]):
        done = run(base.folder / "bin" / "hotgraph", *command, folder=tmp_path)
        assert done.returncode != 0
        assert "hotgraph[server]" in done.stderr, (command, done.stderr)
        assert "Traceback" not in done.stderr
