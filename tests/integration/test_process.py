"""The daemon as a process of its own: signals, exit statuses, sockets and ports that are taken."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import ModelSettings, ServerSettings, Settings
from tests.integration.harness import Caller, eventually, refused
from tests.integration.processes import Process, process

PROGRAM = """
import logging, sys
from hotgraph_server.config import Settings
from hotgraph_server import daemon
from hotgraph_server.engine import FakeEngine
from hotgraph_server.text import ByteTokenizer
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

async def build(settings, clock):
    return daemon.Parts(FakeEngine(clock=clock, step_seconds=0.005), ByteTokenizer(), "fake")

daemon.serve.__kwdefaults__["build"] = build
sys.exit(daemon.run(Settings.model_validate_json(sys.argv[1])))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        yield Path(path)


def run_fake(settings: Settings) -> AbstractAsyncContextManager[Process]:
    return process(settings, PROGRAM)


def fake_settings(*listen: str, **server: Any) -> Settings:
    return Settings(model=ModelSettings(source="fake"), server=ServerSettings(listen=listen, **server))


async def remaining_kinds(call: Any) -> list[str]:
    kinds = []
    while (event := await call.read()) is not grpc.aio.EOF:
        kinds.append(event.WhichOneof("event"))
    return kinds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains_and_the_process_ends_well(folder: Path, number: int) -> None:
    """Running streams finish, new calls are refused, health says so, and the exit status is 0 without a traceback."""
    address = f"unix:{folder}/s"
    async with run_fake(fake_settings(address)) as daemon:
        await daemon.logged("serving fake")
        async with Caller(address) as caller:
            stream = caller.inference.Generate(GenerateRequest(text="x", max_tokens=100))
            await stream.read()
            daemon.signal(number)
            await daemon.logged("draining")
            error = await refused(caller.inference.Complete(CompleteRequest(text="y")))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            response = await caller.health.Check(health_pb2.HealthCheckRequest())
            assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await remaining_kinds(stream))[-1] == "finished"
        assert await daemon.ended() == 0
        assert not any("Traceback" in line or "ERROR" in line for line in daemon.log), daemon.log
        assert os.listdir(folder) == []


async def test_grace_ends_what_is_too_long(folder: Path) -> None:
    """After drain_grace_seconds the rest ends with DRAINING, and the process still ends well."""
    address = f"unix:{folder}/s"
    async with run_fake(fake_settings(address, drain_grace_seconds=0.2)) as daemon:
        await daemon.logged("serving fake")
        async with Caller(address) as caller:
            stream = caller.inference.Generate(GenerateRequest(text="x", max_tokens=1000))
            await stream.read()
            daemon.signal(signal.SIGTERM)
            error = await refused(remaining_kinds(stream))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert error.retry_seconds is not None
        assert await daemon.ended() == 0


async def test_second_signal_ends_at_once(folder: Path) -> None:
    """Nobody waits for the grace after a second signal."""
    address = f"unix:{folder}/s"
    async with run_fake(fake_settings(address, drain_grace_seconds=600.0)) as daemon:
        await daemon.logged("serving fake")
        async with Caller(address) as caller:
            stream = caller.inference.Generate(GenerateRequest(text="x", max_tokens=1000))
            await stream.read()
            daemon.signal(signal.SIGTERM)
            await daemon.logged("draining")
            daemon.signal(signal.SIGTERM)
            error = await refused(remaining_kinds(stream))
            assert error.reason == "DRAINING"
        assert await daemon.ended() == 0


async def test_second_daemon_on_one_socket_is_refused(folder: Path) -> None:
    """It ends with 69 and one clear line; the first serves on, and its socket stays."""
    address = f"unix:{folder}/s"
    async with run_fake(fake_settings(address)) as first:
        await first.logged("serving fake")
        async with run_fake(fake_settings(address)) as second:
            assert await second.ended() == 69
            errors = [line for line in second.log if "ERROR" in line]
            assert len(errors) == 1
            assert "another daemon serves on" in errors[0]
            assert not any("Traceback" in line for line in second.log)
        async with Caller(address) as caller:
            await caller.check_alive()


async def test_stale_socket_is_cleared_away(folder: Path) -> None:
    """After SIGKILL the next daemon takes the path over without help."""
    address = f"unix:{folder}/s"
    async with run_fake(fake_settings(address)) as first:
        await first.logged("serving fake")
        first.signal(signal.SIGKILL)
        await first.ended()
    assert (folder / "s").is_socket()
    async with run_fake(fake_settings(address)) as second:
        await second.logged("serving fake")
        async with Caller(address) as caller:
            await caller.check_alive()


async def test_socket_is_not_for_others(folder: Path) -> None:
    """The socket's mode never gives anything to other users."""
    async with run_fake(fake_settings(f"unix:{folder}/s")) as daemon:
        await daemon.logged("listening on")
        assert stat.S_IMODE((folder / "s").stat().st_mode) & 0o007 == 0


async def test_file_in_the_way_is_a_bad_setting(folder: Path) -> None:
    """A regular file is not removed: exit status 78, and one line that names it."""
    (folder / "s").write_text("precious")
    async with run_fake(fake_settings(f"unix:{folder}/s")) as daemon:
        assert await daemon.ended() == 78
        assert any("is no socket" in line for line in daemon.log)
    assert (folder / "s").read_text() == "precious"


async def test_foreign_live_socket_is_respected(folder: Path) -> None:
    """A socket that another program listens on is not taken over: exit status 69."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "s"))
        other.listen()
        async with run_fake(fake_settings(f"unix:{folder}/s")) as daemon:
            assert await daemon.ended() == 69
    assert (folder / "s").is_socket()


async def test_port_in_use_is_a_clear_error(folder: Path) -> None:
    """A port that is taken: exit status 69, one line with the address, and the socket is given back too."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        async with run_fake(fake_settings(f"unix:{folder}/s", address)) as daemon:
            assert await daemon.ended() == 69
            assert any(f"another process listens on {address}" in line for line in daemon.log)
    assert os.listdir(folder) == []


async def test_second_daemon_on_one_port_is_refused(folder: Path) -> None:
    """Two daemons never share a port silently."""
    async with run_fake(fake_settings("127.0.0.1:0")) as first:
        address = (await first.logged("listening on")).rpartition(" ")[2]
        async with run_fake(fake_settings(address)) as second:
            assert await second.ended() == 69


@pytest.mark.parametrize(
    "listen", ["nowhere", "unix:", "127.0.0.1:99999", "unix:/nonexistent/folder/s", "192.0.2.1:0", "unix:" + "x" * 108]
)
async def test_impossible_address_is_a_bad_setting(listen: str) -> None:
    """Exit status 78, one line, no traceback."""
    async with run_fake(fake_settings(listen)) as daemon:
        assert await daemon.ended() == 78
        assert len([line for line in daemon.log if "ERROR" in line]) == 1
        assert not any("Traceback" in line for line in daemon.log)


@pytest.mark.skipif(sys.platform != "linux", reason="cores are kept awake on Linux only")
async def test_cores_are_awake_while_requests_come(folder: Path) -> None:
    """A child spins at idle priority, sleeps when it has been quiet, wakes with the next request, and ends with the daemon."""
    address = f"unix:{folder}/s"
    core = min(os.sched_getaffinity(0))
    async with run_fake(fake_settings(address, awake_cores=1, awake_seconds=1.0)) as daemon:
        await daemon.logged("serving fake")
        child = child_of(daemon.process.pid)
        await eventually(lambda: os.sched_getscheduler(child) == os.SCHED_IDLE)
        served_by = os.sched_getaffinity(daemon.process.pid)
        assert len(served_by) == 1
        assert served_by != {core} or len(os.sched_getaffinity(0)) == 1  # the first core is left alone if it can be
        async with Caller(address) as caller:
            await caller.check_alive()
            await eventually(lambda: state_of(child) == "T")
            stream = caller.inference.Generate(GenerateRequest(text="x", max_tokens=200))
            await stream.read()
            assert state_of(child) in "RS"
            assert (await remaining_kinds(stream))[-1] == "finished"
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert not is_there(child)


def child_of(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/task/{process_id}/children").read_text())


def is_there(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


def state_of(process_id: int) -> str:
    """As in ps: R runs, S sleeps, T is stopped."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
