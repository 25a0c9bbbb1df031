"""A machine whose PID 1 is a real systemd, in namespaces of this one, for tests of sandbox, watchdog and restarts.

Nothing in it reaches the host: files go to an overlay in memory, and kernel settings are left alone. It needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import graphcache
import hotgraph.v1
import hotgraph_client
import hotgraph_server

HERE = Path(__file__).resolve().parent
BOOT_SECONDS = 30.0
PATIENCE_SECONDS = 30.0
WATCHDOG_SECONDS = 3
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--net", "--kill-child")
TOOLS = ("systemctl", "journalctl", "unshare", "nsenter", "ip", "mount", "runuser")

# The daemon of the tests: `hotgraph` but for the engine, which has no model and does what a prompt tells it to.
PROGRAM = """#!/opt/hotgraph/bin/python
import asyncio, os, time
from hotgraph_server import daemon
from hotgraph_server.cli import main
from hotgraph_server.engine import FakeEngine
from hotgraph_server.text import ByteTokenizer

def seconds(batch):
    prompt = b" ".join(bytes(i for i in a.prompt_token_ids if i < 256) for a in batch.assignments)
    if b"hang" in prompt:
        return 1e6
    if b"block" in prompt:
        time.sleep(1e6)
    if b"fail" in prompt:
        raise RuntimeError("asked for")
    return float(os.environ.get("STEP_SECONDS", "0.01"))

async def build(settings, clock):
    delay = float(os.environ.get("LOAD_SECONDS", "0"))
    end = time.monotonic() + delay
    while time.monotonic() < end:
        sum(range(200_000))
        await asyncio.sleep(0.01)
    return daemon.Parts(FakeEngine(clock=clock, step_seconds=seconds), ByteTokenizer(), "fake")

daemon.serve.__kwdefaults__["build"] = build
main()
"""


def why_not() -> str:
    """Why no such machine can be started here; empty when it can be tried."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if not any(Path(path).exists() for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")):
        return "needs systemd"
    folder = tempfile.mkdtemp(prefix="hotgraph-probe-")
    script = (
        f"mount --make-rprivate / && mount -t tmpfs tmpfs {folder} && mkdir {folder}/u {folder}/w {folder}/r &&"
        f" mount -t overlay overlay -o lowerdir=/,upperdir={folder}/u,workdir={folder}/w {folder}/r &&"
        f" mount -t cgroup2 cgroup2 {folder}/r/mnt"
    )
    done = subprocess.run([*UNSHARE, "bash", "-c", script], capture_output=True, text=True, timeout=30)
    os.rmdir(folder)
    return f"namespaces, overlayfs or cgroup2 are not to be had: {done.stderr.strip()}" if done.returncode else ""


def _sources() -> list[Path]:
    """The folders from which this process has our packages, each once."""
    modules = (hotgraph_server, graphcache, hotgraph_client, hotgraph.v1)
    roots = [Path(str(module.__file__)).resolve().parents[module.__name__.count(".") + 1] for module in modules]
    return list(dict.fromkeys(roots))


class Machine:
    """A running one. Paths of it are seen from here below `root`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    @property
    def socket(self) -> str:
        """The daemon's address, from outside: sockets with a path know no namespaces of networks."""
        return f"unix:{self.root}/run/hotgraph/hotgraph.sock"

    def run(self, *command: str, check: bool = True, timeout: float = PATIENCE_SECONDS) -> str:
        """Runs a command as root inside; returns what it prints."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--all", "env", "-i", f"PATH={PATH}", *command],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.journal()[-6000:]}"
        return done.stdout

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", *arguments, check=check, timeout=90)

    def show(self, unit: str = "hotgraph.service") -> dict[str, str]:
        """All properties of a unit."""
        lines = self.run("systemctl", "show", unit).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def wait(self, is_so: Callable[[dict[str, str]], bool], unit: str = "hotgraph.service") -> dict[str, str]:
        """The unit's properties once they are so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so(properties := self.show(unit)):
            assert time.monotonic() < deadline, (
                {
                    name: properties.get(name)
                    for name in ("ActiveState", "SubState", "Result", "StatusText", "NRestarts")
                },
                self.journal()[-6000:],
            )
            time.sleep(0.05)
        return properties

    def journal(self, unit: str = "") -> str:
        """Messages of all units, or of one and of systemd about it."""
        selected = [f"--unit={unit}"] if unit else []
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *selected, check=False)

    def events(self, unit: str) -> list[dict[str, Any]]:
        """The journal of a unit, an entry a line; `seconds` on the clock of time.monotonic."""
        lines = self.run("journalctl", "--no-pager", "--output=json", f"--unit={unit}").splitlines()
        entries = [json.loads(line) for line in lines]
        return [entry | {"seconds": int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6} for entry in entries]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file inside, root's."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)


def install(machine: Machine) -> None:
    """Installs the units with hotgraph's own installer, and makes the user and the folders with systemd's own tools."""
    command = [sys.executable, "-m", "hotgraph_server.cli", "systemd", "install", "--prefix", "/opt/hotgraph", "--yes"]
    done = subprocess.run([*command, "--destdir", str(machine.root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    machine.write("/opt/hotgraph/bin/hotgraph", PROGRAM, 0o755)
    machine.run("systemd-sysusers")
    machine.run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/hotgraph.conf")
    environment = " ".join([*program_environment(), "HOTGRAPH_MODEL__SOURCE=fake"])
    test = f"[Service]\nEnvironment={environment}\nWatchdogSec={WATCHDOG_SECONDS}\n"
    for unit in ("hotgraph", "hotgraph@"):
        machine.write(f"/etc/systemd/system/{unit}.service.d/90-test.conf", test)
    machine.systemctl("daemon-reload")


def program_environment() -> list[str]:
    """What `hotgraph` needs inside to find its code and its Python: where these lie outside is not seen there."""
    paths = ":".join(f"/opt/source/{index}" for index in range(len(_sources())))
    # A Python with a library of its own looks for it where it was built, which the sandbox hides.
    return [f"PYTHONPATH={paths}", "LD_LIBRARY_PATH=/opt/python/lib"]


@contextmanager
def machine() -> Iterator[Machine]:
    """Boots one; it and all its processes are gone in the end."""
    packages, python = sysconfig.get_path("purelib"), sys.base_prefix
    with tempfile.TemporaryDirectory(prefix="hotgraph-machine-") as work, tempfile.TemporaryFile() as log:
        command = [*UNSHARE, str(HERE / "boot.sh"), work, python, packages, *map(str, _sources())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            running = _booted(process, lambda: _text(log))
            yield running
        finally:
            process.send_signal(signal.SIGKILL)  # what is inside goes with it
            process.wait()


def _text(log: Any) -> str:
    log.seek(0)
    return str(log.read().decode(errors="replace"))


def _booted(process: subprocess.Popen[bytes], said: Callable[[], str]) -> Machine:
    deadline = time.monotonic() + BOOT_SECONDS
    state = ""
    while time.monotonic() < deadline:
        assert process.poll() is None, said()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "systemd":
            found = Machine(int(children[0]))
            state = found.run("systemctl", "is-system-running", check=False).strip()
            if state == "running":
                return found
            assert state != "degraded", found.run("systemctl", "--failed") + found.journal()
        time.sleep(0.1)
    raise AssertionError(f"systemd is {state!r} after {BOOT_SECONDS:.0f} s: {said()}")
