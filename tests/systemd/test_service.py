"""The installed service under a real systemd: how it starts, ends, comes back, and what its sandbox keeps from it.

The engine is the fake one; all else is as it is installed, but for a shorter watchdog.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.certificates import make_authority, make_certificate
from tests.integration.harness import Caller, refused
from tests.systemd.machine import WATCHDOG_SECONDS, Machine, install, machine, program_environment, why_not

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=f"a real systemd: {REASON}")]

ROOT = Path(__file__).resolve().parents[2]
DROP_INS = "/etc/systemd/system/hotgraph.service.d"
SETTINGS = """
[server]
drain_grace_seconds = 3

[scheduler]
max_waiting = 11
num_slots = 16
"""


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    with machine() as running:
        install(running)
        yield running


@pytest.fixture
def host(booted: Machine) -> Iterator[Machine]:
    """The machine with the settings of these tests and no service running; what a test changes is put back."""
    booted.write("/etc/hotgraph/hotgraph.toml", SETTINGS)
    booted.write("/etc/hotgraph/hotgraph.env", "")
    yield booted
    for unit in ("hotgraph.service", "hotgraph@0.service"):
        booted.systemctl("stop", unit)
        booted.systemctl("reset-failed", unit, check=False)
    for path in (booted.root / DROP_INS.lstrip("/")).glob("95-*.conf"):
        path.unlink()
    booted.systemctl("daemon-reload")


def change(host: Machine, text: str) -> None:
    """A drop-in of one test."""
    host.write(f"{DROP_INS}/95-test.conf", text)
    host.systemctl("daemon-reload")


def started(host: Machine) -> float:
    """Starts the service; returns the seconds it took."""
    before = time.monotonic()
    host.systemctl("start", "hotgraph.service")
    return time.monotonic() - before


def is_serving(properties: dict[str, str]) -> bool:
    return properties["ActiveState"] == "active" and properties.get("StatusText", "").startswith("serving fake")


def restarted(host: Machine, num_restarts: int) -> dict[str, str]:
    return host.wait(lambda now: is_serving(now) and now["NRestarts"] == str(num_restarts))


async def completed(host: Machine, text: str = "x", **request: Any) -> Any:
    async with Caller(host.socket) as caller:
        return await caller.inference.Complete(CompleteRequest(text=text, **{"max_tokens": 3, **request}))


async def lost(host: Machine, text: str) -> None:
    """A call that the daemon does not survive."""
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(completed(host, text), 60)


async def test_start(host: Machine) -> None:
    """`systemctl start` returns when the daemon serves; the socket is for its group and for nobody else."""
    started(host)
    properties = host.show()
    assert is_serving(properties)
    assert (properties["Type"], properties["NRestarts"], properties["Result"]) == ("notify", "0", "success")
    assert properties["StatusText"] == "serving fake: 0 running, 0 waiting"
    assert len((await completed(host)).choices) == 1
    listed = host.run("stat", "-c", "%a %U %G", "/run/hotgraph", "/run/hotgraph/hotgraph.sock").splitlines()
    assert listed == ["750 hotgraph hotgraph-clients", "660 hotgraph hotgraph-clients"]
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/hotgraph/hotgraph.sock')"
    python = ("env", "LD_LIBRARY_PATH=/opt/python/lib", "/opt/hotgraph/bin/python", "-c", connect)
    host.run("runuser", "-u", "nobody", "-g", "hotgraph-clients", "--", *python)
    assert host.run("runuser", "-u", "nobody", "--", *python, "allowed", check=False) == ""
    with pytest.raises(AssertionError, match="PermissionError"):
        host.run("runuser", "-u", "nobody", "--", *python)


def test_not_active_before_it_serves(host: Machine) -> None:
    """While it loads the unit is activating and says so; a load longer than TimeoutStartSec is waited for while it works."""
    change(host, "[Service]\nEnvironment=LOAD_SECONDS=5\nTimeoutStartSec=3\n")
    host.systemctl("start", "--no-block", "hotgraph.service")
    properties = host.wait(lambda now: now.get("StatusText", "").startswith("loading fake"))
    assert properties["ActiveState"] == "activating"
    host.wait(is_serving)
    assert host.show()["NRestarts"] == "0"


async def test_killed(host: Machine) -> None:
    """After SIGKILL it serves again, on the same socket, within RestartSec, a start and half a second."""
    start_seconds = started(host)
    pid = host.show()["MainPID"]
    killed_at = time.monotonic()
    host.systemctl("kill", "--signal=KILL", "hotgraph.service")
    properties = restarted(host, 1)
    seconds = time.monotonic() - killed_at
    print(f"start {start_seconds:.2f} s, serving again {seconds:.2f} s after SIGKILL")
    assert properties["MainPID"] != pid
    assert seconds <= 1 + 2 * start_seconds + 0.5  # the machine's other work doubles a start now and then
    await completed(host)


@pytest.mark.parametrize("what", ["hang", "block"])
async def test_hang(host: Machine, what: str) -> None:
    """An engine whose step never ends, and a loop that is blocked: found within WatchdogSec and a second, and restarted.

    The journal has the stacks. Before, at work for longer than the watchdog's time, nothing happens.
    """
    started(host)
    until = time.monotonic() + (1.5 * WATCHDOG_SECONDS if what == "hang" else 0)
    while time.monotonic() < until:
        await completed(host, max_tokens=50)
    assert host.show()["NRestarts"] == "0"
    hung_at = time.monotonic()
    await lost(host, what)
    properties = restarted(host, 1)
    events = [event for event in host.events("hotgraph.service") if event["seconds"] >= hung_at]
    found = next(event["seconds"] for event in events if "Watchdog timeout" in event["MESSAGE"])
    print(f"{what}: found after {found - hung_at:.2f} s of a watchdog of {WATCHDOG_SECONDS} s")
    assert found - hung_at <= WATCHDOG_SECONDS + 1
    assert any("most recent call first" in str(event["MESSAGE"]) for event in events)
    assert properties["NRestarts"] == "1"


async def test_failed_engine(host: Machine) -> None:
    """An engine that fails ends the process with 70, and systemd starts another."""
    started(host)
    await lost(host, "fail")
    restarted(host, 1)
    assert "status=70" in host.journal("hotgraph.service")
    await completed(host)


async def test_reload(host: Machine) -> None:
    """The same process takes over what it can, tells what waits for a restart, and stays as it is when settings are wrong."""
    started(host)
    pid = host.show()["MainPID"]
    host.write("/etc/hotgraph/hotgraph.toml", SETTINGS.replace("= 11", "= 22").replace("= 16", "= 32"))
    host.systemctl("reload", "hotgraph.service")
    remark = "a restart would change scheduler.num_slots"
    host.wait(lambda now: is_serving(now) and remark in now["StatusText"])
    async with Caller(host.socket) as caller:
        assert (await caller.status()).scheduler.max_waiting == 22
    host.write("/etc/hotgraph/hotgraph.toml", "[scheduler]\nmax_wating = 1\n")
    host.systemctl("reload", "hotgraph.service")
    properties = host.wait(lambda now: is_serving(now) and "reload refused" in now["StatusText"])
    assert (properties["MainPID"], properties["NRestarts"]) == (pid, "0")
    async with Caller(host.socket) as caller:
        assert (await caller.status()).scheduler.max_waiting == 22


async def test_drain_under_load(host: Machine) -> None:
    """A stop lets streams finish that can within the grace, ends the others with DRAINING, and is over just after that."""
    started(host)
    async with Caller(host.socket) as caller:
        short = [caller.inference.Generate(GenerateRequest(text="x", max_tokens=100)) for _ in range(8)]
        endless = [caller.inference.Generate(GenerateRequest(text="x", max_tokens=1000)) for _ in range(4)]
        for call in (*short, *endless):
            await call.read()
        begin = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(host.systemctl, "stop", "hotgraph.service"))

        async def last(call: Any) -> str:
            kind = ""
            while (event := await call.read()) is not grpc.aio.EOF:
                kind = event.WhichOneof("event")
            return kind

        properties = await asyncio.to_thread(host.wait, lambda now: "draining" in now.get("StatusText", ""))
        assert properties["ActiveState"] == "deactivating"
        assert {await last(call) for call in short} == {"finished"}
        errors = [await refused(last(call)) for call in endless]
        assert {error.reason for error in errors} == {"DRAINING"}
        await stopping
    seconds = time.monotonic() - begin
    print(f"drained in {seconds:.2f} s of a grace of 3 s")
    assert seconds <= 3 + 2
    properties = host.show()
    assert (properties["Result"], properties["ExecMainStatus"]) == ("success", "0")
    assert "Traceback" not in host.journal("hotgraph.service").rpartition("draining, for")[2]


async def test_long_drain_is_not_cut_off(host: Machine) -> None:
    """A grace longer than TimeoutStopSec is kept: the daemon asks systemd for the time."""
    change(host, "[Service]\nTimeoutStopSec=1\n")
    started(host)
    async with Caller(host.socket) as caller:
        call = caller.inference.Generate(GenerateRequest(text="x", max_tokens=1000))
        await call.read()
        await asyncio.to_thread(host.systemctl, "stop", "hotgraph.service")
    assert (host.show()["Result"], host.show()["ExecMainStatus"]) == ("success", "0")


@pytest.mark.parametrize("text", ["[scheduler]\nnum_slots = 0\n", "[server]\nlisten = ['nowhere']\n"])
def test_wrong_settings_are_not_tried_again(host: Machine, text: str) -> None:
    """Exit status 78 is the end: no restart."""
    change(host, "[Service]\nEnvironment=HOTGRAPH_SERVER__LISTEN=\n")
    host.write("/etc/hotgraph/hotgraph.toml", text)
    host.systemctl("start", "hotgraph.service", check=False)
    time.sleep(1.5)  # more than RestartSec
    properties = host.show()
    assert properties["ActiveState"] == "failed"
    assert (properties["ExecMainStatus"], properties["NRestarts"]) == ("78", "0")


def test_start_limit(host: Machine) -> None:
    """An address that stays taken (69) is tried again, and given up after StartLimitBurst starts, with the reason told."""
    host.write("/etc/hotgraph/hotgraph.env", "HOTGRAPH_SERVER__LISTEN=127.0.0.1:50061\n")
    host.systemctl("start", "hotgraph@0.service")
    change(host, "[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=100ms\n")
    host.systemctl("start", "hotgraph.service", check=False)
    properties = host.wait(lambda now: now["ActiveState"] == "failed" and now["SubState"] == "failed")
    host.systemctl("start", "hotgraph.service", check=False)
    properties = host.show()
    assert (properties["ExecMainStatus"], properties["NRestarts"]) == ("69", "3")
    assert "another process listens on 127.0.0.1:50061" in properties["StatusText"]
    assert properties["StatusErrno"] == "98"
    assert "Start request repeated too quickly" in host.journal("hotgraph.service")
    assert is_serving(host.show("hotgraph@0.service"))


async def test_instances_leave_each_other_alone(host: Machine) -> None:
    """Instances have sockets of their own, and GPUs; one that stops takes nothing of another along."""
    host.systemctl("start", "hotgraph@0.service")
    started(host)
    host.systemctl("stop", "hotgraph.service")
    assert not (host.root / "run/hotgraph").exists()
    async with Caller(host.socket.replace("run/hotgraph", "run/hotgraph-0")) as caller:
        await caller.check_alive()
    pid = host.show("hotgraph@0.service")["MainPID"]
    environment = host.run("cat", f"/proc/{pid}/environ").split("\0")
    assert {"CUDA_VISIBLE_DEVICES=0", "CUDA_DEVICE_ORDER=PCI_BUS_ID"} <= set(environment)


async def test_unix_only(host: Machine) -> None:
    """The drop-in for Unix sockets serves as before, and the service sees no interface but its own loopback."""
    source = ROOT / "server/hotgraph_server/systemd/files/unix-only.conf"
    change(host, source.read_text())
    started(host)
    await completed(host)
    interfaces = host.run("nsenter", f"--target={host.show()['MainPID']}", "--net", "ip", "-o", "address").splitlines()
    assert all(" lo " in line and "192.0.2.1" not in line for line in interfaces), interfaces


async def test_settings_as_a_credential(host: Machine) -> None:
    """The drop-in for credentials: settings that only root can read are served; a reload reads the copy made at the start."""
    source = ROOT / "server/hotgraph_server/systemd/files/credentials.conf"
    change(host, source.read_text())
    host.write("/etc/hotgraph/hotgraph.toml", SETTINGS, 0o600)
    started(host)
    pid = host.show()["MainPID"]
    copy = "/run/credentials/hotgraph.service/hotgraph.toml"
    assert host.run("nsenter", f"--target={pid}", "--mount", "stat", "-c", "%a", copy).strip() in ("400", "440")
    assert host.run("runuser", "-u", "nobody", "--", "cat", copy, check=False) == ""
    host.write("/etc/hotgraph/hotgraph.toml", SETTINGS.replace("= 11", "= 22"), 0o600)
    host.systemctl("reload", "hotgraph.service")
    host.wait(lambda now: "reloaded: nothing has changed" in host.journal("hotgraph.service"))
    async with Caller(host.socket) as caller:
        assert (await caller.status()).scheduler.max_waiting == 11


async def test_lan(host: Machine, tmp_path: Path) -> None:
    """The drop-in for a network: TLS and tokens from files that only root can read; without a token nobody is the admin.

    Without its settings the same address is refused: status 78, not tried again.
    """
    make_authority(tmp_path, "ca")
    make_certificate(tmp_path, "server")
    token = secrets.token_urlsafe()
    for name, text in (
        ("tls.crt", (tmp_path / "server.pem").read_text()),
        ("tls.key", (tmp_path / "server.key").read_text()),
        ("ca.crt", (tmp_path / "ca.pem").read_text()),
        ("tokens", f"admin root {token}\n"),
        ("token", f"{token}\n"),
    ):
        host.write(f"/etc/hotgraph/{name}", text, 0o600)
    host.write("/etc/hotgraph/hotgraph.env", "HOTGRAPH_SERVER__LISTEN=unix:/run/hotgraph/hotgraph.sock,0.0.0.0:50051\n")
    change(host, (ROOT / "server/hotgraph_server/systemd/files/lan.conf").read_text())
    started(host)
    await completed(host)
    status = [
        "env",
        *program_environment(),
        "/opt/hotgraph/bin/hotgraph",
        "status",
        "--json",
        "--target",
        "localhost:50051",
        "--tls-ca",
        "/etc/hotgraph/ca.crt",
    ]
    assert json.loads(host.run(*status, "--token-file", "/etc/hotgraph/token"))["model"] == "fake"
    assert host.run(*status, check=False) == ""
    host.systemctl("stop", "hotgraph.service")
    change(host, "")
    host.systemctl("start", "hotgraph.service", check=False)
    failed = host.wait(lambda now: now["ActiveState"] == "failed")
    assert (failed["ExecMainStatus"], failed["NRestarts"]) == ("78", "0")
    assert "is open to the network" in host.journal("hotgraph.service")


ALLOWED = {"write to its state", "open /dev/null", "reach loopback", "choose its processors"}
ALLOWED |= {"map code it writes", "run a program from /var/cache/hotgraph"}  # compilers of kernels need them


def test_sandbox(host: Machine) -> None:
    """Inside the unit everything is denied that it declares, and not what the daemon needs; outside it is allowed."""
    host.write("/opt/hotgraph/probe.py", (Path(__file__).parent / "probe.py").read_text())
    port = "50071"
    listen = f"import socket,time; s=socket.create_server(('', {port})); time.sleep(60)"
    python = ("env", "LD_LIBRARY_PATH=/opt/python/lib", "/opt/hotgraph/bin/python")
    host.systemctl("stop", "listener.service", check=False)
    host.run("systemd-run", "--unit=listener", *python, "-c", listen)
    host.run("bash", "-c", f"until ss -ltn | grep -q :{port}; do sleep 0.05; done")
    command = f"/opt/hotgraph/bin/python /opt/hotgraph/probe.py {port}"
    change(host, f"[Service]\nType=oneshot\nWatchdogSec=0\nRestart=no\nExecStart=\nExecStart={command}\n")
    host.systemctl("start", "hotgraph.service")
    lines = [str(event["MESSAGE"]) for event in host.events("hotgraph.service")]
    (line,) = (line for line in lines if line.startswith("outcomes "))
    inside = json.loads(line.removeprefix("outcomes "))
    outside = json.loads(host.run(*python, "/opt/hotgraph/probe.py", port).removeprefix("outcomes "))
    host.systemctl("stop", "listener.service")
    print(json.dumps({name: (inside[name], outside[name]) for name in inside}, indent=1))
    assert {name for name, outcome in inside.items() if outcome == "done"} == ALLOWED
    free = {name for name, outcome in outside.items() if outcome == "done"}
    denied = inside.keys() - ALLOWED
    assert denied - free == {"set the clock", "run a program from /run/hotgraph"}, outside  # the latter is not there


def test_smoke_before_it_counts_as_started(host: Machine) -> None:
    """grpcurl's smoke test as ExecStartPost: the start is over when it has passed, and fails where it fails."""
    grpcurl = os.environ.get("GRPCURL") or shutil.which("grpcurl") or str(ROOT / ".tools/bin/grpcurl")
    if not os.access(grpcurl, os.X_OK):
        pytest.skip("needs grpcurl: tests/smoke/install_grpcurl.sh")
    shutil.copy2(grpcurl, host.root / "opt/hotgraph/bin/grpcurl")
    shutil.copy2(ROOT / "tests/smoke/grpcurl.sh", host.root / "opt/hotgraph/bin/smoke.sh")
    smoke = "/opt/hotgraph/bin/smoke.sh unix:/run/hotgraph/hotgraph.sock"
    post = f"[Service]\nEnvironment=GRPCURL=/opt/hotgraph/bin/grpcurl\nExecStartPost={smoke}"
    change(host, f"{post}\n")
    seconds = started(host)
    assert " passed, 0 failed" in host.journal("hotgraph.service")
    print(f"start with the smoke test {seconds:.2f} s")
    host.systemctl("stop", "hotgraph.service")
    change(host, f"{post} --expect-model another\n[Unit]\nStartLimitBurst=1\n")
    with pytest.raises(AssertionError):
        host.systemctl("start", "hotgraph.service")
    assert "FAIL the model is another" in host.journal("hotgraph.service")


def test_sockets_are_the_configured_ones(host: Machine) -> None:
    """The service listens on its Unix socket and nowhere else."""
    started(host)
    pid = host.show()["MainPID"]
    listening = [line for line in host.run("ss", "-Hlntup").splitlines() if f"pid={pid}," in line]
    assert listening == []
    unix = [line for line in host.run("ss", "-Hlxp").splitlines() if f"pid={pid}," in line and "LISTEN" in line]
    assert len(unix) == 1
    assert "/run/hotgraph/hotgraph.sock" in unix[0]
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", 50051)) != 0
