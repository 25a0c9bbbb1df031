"""The daemon's life in one process: what starts, what ends, and in which order."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Never

import grpc
import pytest

from graphcache import Clock
from hotgraph.v1.inference_service_pb2 import GenerateRequest
from hotgraph_server.config import ModelSettings, Settings
from hotgraph_server.daemon import Daemon, DaemonState, ExitStatus, Parts
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import ModelLoadError, SettingsError
from tests.integration.harness import PATIENCE_SECONDS, eventually, letters, refused, serving, settings


async def ended(run: asyncio.Task[ExitStatus]) -> ExitStatus:
    return await asyncio.wait_for(run, PATIENCE_SECONDS)


async def test_life_without_a_request_leaves_nothing(folder: Path) -> None:
    """Start, load, drain, stop: status 0, no socket, no lock, no task of ours left."""
    before = asyncio.all_tasks()
    daemon = Daemon(settings(folder))
    run = asyncio.create_task(daemon.run())
    await eventually(lambda: daemon.lifecycle.state is DaemonState.SERVING)
    assert repr(daemon) == f"<Daemon serving on unix:{folder}/s>"
    daemon.drain()
    assert await ended(run) is ExitStatus.OK
    assert daemon.lifecycle.state is DaemonState.STOPPED
    assert os.listdir(folder) == []
    names = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not names & {"scheduler", "warmth", "fake-engine"}
    await daemon.stop()  # may be called again


async def test_drain_while_loading_abandons_the_load(folder: Path) -> None:
    """Nobody waits for a model that nobody wants: the daemon ends well, and calls meanwhile hear DRAINING."""
    is_abandoned = asyncio.Event()

    async def build(settings: Settings, clock: Clock) -> Parts:
        try:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody sets that future")
        finally:
            is_abandoned.set()

    daemon = Daemon(settings(folder), build=build)
    run = asyncio.create_task(daemon.run())
    await eventually(lambda: daemon.addresses)
    daemon.drain()
    assert daemon.lifecycle.state is DaemonState.DRAINING
    assert await ended(run) is ExitStatus.OK
    assert is_abandoned.is_set()


async def test_signal_while_a_model_loads_in_its_thread_ends_the_daemon(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocking load cannot be stopped, but it does not hold the daemon up."""
    is_loading, may_end = threading.Event(), threading.Event()

    def load_model(_: ModelSettings) -> Never:
        is_loading.set()
        may_end.wait(PATIENCE_SECONDS)
        raise ModelLoadError("nobody hears of this")

    monkeypatch.setattr("hotgraph_server.models.load_model", load_model)
    daemon = Daemon(Settings(model=ModelSettings(source="slow"), server=settings(folder).server))
    run = asyncio.create_task(daemon.run())
    await eventually(is_loading.is_set)
    daemon.on_signal()
    assert await ended(run) is ExitStatus.OK
    may_end.set()


async def test_unexpected_load_error_is_raised_with_nothing_left_open(folder: Path) -> None:
    """A bug while loading is not dressed up as a setting; sockets are given back all the same."""

    async def build(settings: Settings, clock: Clock) -> Parts:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Daemon(settings(folder), build=build).run()
    assert os.listdir(folder) == []


async def test_grace_is_never_longer_than_the_settings(folder: Path) -> None:
    """drain tells what is left, capped by the settings, and only ever less of it."""
    engine = FakeEngine(rule=letters, step_seconds=0.01)
    async with serving(engine=engine, server={"drain_grace_seconds": 5.0}) as served:
        stream = served.inference.Generate(GenerateRequest(text="x", max_tokens=1000))
        await stream.read()
        assert served.daemon.drain(1000.0) == pytest.approx(5.0, abs=0.1)
        assert served.daemon.drain(2.0) == pytest.approx(2.0, abs=0.1)
        assert served.daemon.drain(4.0) < 2.0
        served.daemon.drain(-1.0)

        async def read_on() -> None:
            while await stream.read() is not grpc.aio.EOF:
                pass

        assert (await refused(read_on())).reason == "DRAINING"
        assert await ended(served.run) is ExitStatus.OK
        assert served.daemon.drain() == 0.0


async def test_failed_listener_ends_the_life(folder: Path) -> None:
    """A daemon that cannot listen raises what is wrong and is stopped."""
    (folder / "s").write_text("in the way")
    daemon = Daemon(settings(folder))
    with pytest.raises(SettingsError):
        await daemon.run()
    assert daemon.lifecycle.state is DaemonState.STOPPED
