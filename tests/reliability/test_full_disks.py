"""No room on the disk, and nobody who reads the log: what the daemon still does, and what it counts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.config import GraphSettings, MetricsSettings
from tests.integration.harness import Caller, eventually
from tests.reliability.probe import percentile
from tests.reliability.victims import program, settings, victim
from tests.server.observability.scraping import scrape

STOP_SECONDS: Final = 10.0
# As `hotgraph serve` logs: through a queue, here of 40 lines, and without leaving out lines of bursts.
LOGGED: Final = """
from hotgraph_server import logs
from hotgraph_server.config import LoggingSettings
logs.MAX_QUEUED_LINES = 40
logs.BURST_LINES = 10**9
logging.getLogger().handlers.clear()
with logs.logging_to(LoggingSettings(level="debug", format="json")):
    status = daemon.run(Settings.model_validate_json(sys.argv[1]))
sys.exit(status)
"""


def logged_program(**changes: Any) -> str:
    """The program of `victims`, logging as the command does."""
    text = program(**changes)
    end = "sys.exit(daemon.run("
    assert end in text
    return text[: text.index(end)] + LOGGED


@asynccontextmanager
async def stalled(folder: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], Caller, str]]:
    """A daemon whose standard error is a full pipe that nobody reads, a caller, and where its metrics are."""
    sections = {"metrics": MetricsSettings(listen=(f"unix:{folder}/m",))}
    arguments = (sys.executable, "-c", logged_program(), settings(folder, is_tcp=False, **sections).model_dump_json())
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)  # for the daemon, which has the same end
    running = subprocess.Popen(arguments, stderr=writing)  # noqa: ASYNC220  (its end is polled)
    os.close(writing)
    try:
        async with Caller(f"unix:{folder}/s") as caller:
            await eventually(lambda: is_serving(caller))
            yield running, caller, f"unix:{folder}/m"
    finally:
        running.kill()
        running.wait()
        os.close(reading)


async def is_serving(caller: Caller) -> bool:
    try:
        response = await caller.health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.aio.AioRpcError:
        return False  # not there yet
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def complete_many(caller: Caller, num_calls: int) -> list[float]:
    """Milliseconds of calls, one after the other."""
    times = []
    for _ in range(num_calls):
        begin = time.monotonic()
        await caller.inference.Complete(CompleteRequest(text="x", max_tokens=1), timeout=10.0)
        times.append(1000 * (time.monotonic() - begin))
    return times


async def test_a_log_that_nobody_reads() -> None:
    """Calls are served as before, lost lines are counted in a metric, and SIGTERM still ends the daemon."""
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        async with stalled(folder) as (running, caller, metrics):
            times = await complete_many(caller, 300)
            page = await scrape(metrics)
            num_lost = page.value("hotgraph_log_lines_lost_total")
            assert num_lost >= 100
            assert percentile(times, 0.99) < 1000
            running.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            await eventually(lambda: running.poll() is not None, STOP_SECONDS)
            print(
                f"calls p50 {percentile(times, 0.5):.1f} p99 {percentile(times, 0.99):.1f} ms, {num_lost:.0f} lines lost,"
                f" ended {time.monotonic() - begin:.1f} s after SIGTERM"
            )
            assert running.returncode == 0


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a small file system that has no room left but for names; in it a file `profile` with something in it."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    try:
        (folder / "profile").write_text("{}")
        with open(folder / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


async def check_disk(folder: Path, num_warnings: int) -> None:
    """State and profile there: the daemon serves, warns so many times of what it could not keep, and ends well."""
    sections = {
        "graphs": GraphSettings(profile=folder / "profile"),
        "scheduler": {"crash_record": folder / "crashes"},
    }
    async with victim(is_tcp=False, sections=sections) as daemon, Caller(daemon.address) as caller:
        before = (folder / "profile").read_text()
        times = await complete_many(caller, 100)
        assert percentile(times, 0.99) < 1000
        daemon.process.signal(signal.SIGTERM)
        assert await daemon.process.ended() == 0
        warnings = [
            line for line in daemon.process.log if "crash record" in line or "profile cannot be written" in line
        ]
        assert len(warnings) == num_warnings, daemon.process.log
        assert ((folder / "profile").read_text() == before) is (num_warnings > 0)
        assert not any("Traceback" in line for line in daemon.process.log)
        assert [name for name in os.listdir(folder) if name.startswith(".")] == [], "nothing half written stays"


async def test_a_full_disk(full_disk: Path) -> None:
    """Where nothing can be written the daemon serves on and ends well; it warns, and the old profile is whole."""
    await check_disk(full_disk, 2)


async def test_a_disk_with_room(tmp_path: Path) -> None:
    """The control: where there is room there are no warnings, and the profile is written."""
    (tmp_path / "profile").write_text("{}")
    await check_disk(tmp_path, 0)
