"""SIGTERM at bad moments, and a second one: how long the process takes to end, and how it does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest

from hotgraph.v1.inference_service_pb2 import GenerateRequest
from tests.integration.harness import Caller, refused
from tests.integration.processes import Process, process
from tests.reliability.attackers import GENERATE
from tests.reliability.victims import program, settings, victim
from tests.reliability.wire import wire
from tests.server.models.tiny_models import write_llama

SECOND_SECONDS: Final = 2.0
LOADING_SECONDS: Final = 5.0
CAPTURING_SECONDS: Final = 5.0

# Loading takes a minute, in a thread, as that of weights does.
SLOW_LOAD: Final = """
import time
from hotgraph_server.threads import in_daemon_thread
own_start = FakeEngine.start

async def start(self):
    await in_daemon_thread(lambda: time.sleep(60))
    await own_start(self)

FakeEngine.start = start
"""
# A capture takes a minute, as one may that compiles kernels.
SLOW_CAPTURE: Final = """
import time
from graphcache import EagerBackend
own_capture = EagerBackend.capture

def capture(self, name, work):
    logging.warning("captures")
    time.sleep(60)
    return own_capture(self, name, work)

EagerBackend.capture = capture
"""


async def ended_after(running: Process, seconds: float, *, status: int = 0) -> float:
    """How long it takes from now to the end, at most so long; nothing of it may look like a mistake."""
    begin = time.monotonic()
    assert await asyncio.wait_for(running.process.wait(), seconds) == status
    taken = time.monotonic() - begin
    await running.ended()
    assert not any("Traceback" in line for line in running.log), running.log
    return taken


async def second_signal(num_signals: int) -> float:
    """Streams that go on for long, of which eight are not read, a grace of ten minutes, and so many signals."""
    async with (
        victim(sections={"server": {"drain_grace_seconds": 600.0}}, step_seconds=0.02) as daemon,
        Caller(daemon.address) as caller,
        wire(daemon.address, reads=False, window_bytes=0) as silent,
    ):
        message = GenerateRequest(text="x", max_tokens=1000)
        for _ in range(8):
            silent.call(GENERATE, message.SerializeToString())
        calls = [caller.inference.Generate(message) for _ in range(20)]
        for call in calls:
            await call.read()
        daemon.process.signal(signal.SIGTERM)
        await daemon.process.logged("draining")
        ends = [asyncio.create_task(refused(read_all(call))) for call in calls]
        await asyncio.sleep(0.3)
        assert not any(end.done() for end in ends)
        for _ in range(num_signals - 1):
            daemon.process.signal(signal.SIGTERM)
        taken = await ended_after(daemon.process, SECOND_SECONDS)
        for end in await asyncio.gather(*ends):
            assert (end.code, end.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        return taken


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_second_signal_ends_in_time() -> None:
    """A second SIGTERM ends a drain within 2 s with status 0, whoever reads or does not, and callers hear of it."""
    print(f"ended after {await second_signal(2):.2f} s")


async def test_one_signal_does_not() -> None:
    """The control: with one signal the drain goes on."""
    with pytest.raises(TimeoutError):
        await second_signal(1)


async def test_a_reload_that_comes_too_late_changes_no_end() -> None:
    """SIGHUP after SIGHUP while it ends: the status is its own. Death by SIGHUP is a clean end to systemd: no restart."""
    async with victim() as daemon:
        daemon.process.signal(signal.SIGTERM)
        while daemon.process.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    daemon.process_id, signal.SIGHUP
                )  # asyncio's own way may take the exit status away from who waits
            await asyncio.sleep(0.002)
        await ended_after(daemon.process, 1.0)


async def test_signal_while_loading() -> None:
    """A daemon that is told to end while its model loads ends within 5 s, with status 0, whatever the load waits for."""
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        async with process(settings(folder), program(more=SLOW_LOAD)) as running:
            await running.logged("listening on")
            await asyncio.sleep(0.2)
            running.signal(signal.SIGTERM)
            print(f"ended after {await ended_after(running, LOADING_SECONDS):.2f} s")


@pytest.mark.parametrize("delay_seconds", [0.0, 1.0])
async def test_signal_while_a_real_model_loads(delay_seconds: float) -> None:
    """The same of `hotgraph serve` with a real, tiny model: while libraries are imported, and later."""
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        model = write_llama(Path(folder) / "model")
        arguments = ("serve", "--model", str(model), "--listen", f"unix:{folder}/s", "--device", "cpu")
        running = Process(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hotgraph_server.cli", *arguments, stderr=asyncio.subprocess.PIPE
            )
        )
        try:
            await running.logged("listening on")
            await asyncio.sleep(delay_seconds)
            running.signal(signal.SIGTERM)
            print(f"ended after {await ended_after(running, LOADING_SECONDS):.2f} s")
            assert not any("serving model" in line for line in running.log)
        finally:
            if running.process.returncode is None:
                running.signal(signal.SIGKILL)
            await running.ended()


async def test_signal_while_capturing() -> None:
    """A capture that takes a minute does not keep the process for longer than 5 s; status 0."""
    async with victim(more=SLOW_CAPTURE) as daemon, Caller(daemon.address) as caller:
        await caller.check_alive()
        await daemon.process.logged("captures")
        daemon.process.signal(signal.SIGTERM)
        print(f"ended after {await ended_after(daemon.process, CAPTURING_SECONDS):.2f} s")
