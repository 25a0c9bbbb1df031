"""The daemon's life in one process: what starts, what ends, in which order, and with which exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import grpc
import pytest

from graphcache import Clock
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import GraphSettings, ModelSettings, Settings
from hotgraph_server.daemon import Daemon, DaemonState, ExitStatus, Parts, build_parts, serve
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import AddressInUseError, ModelLoadError, NotPossibleError, SettingsError
from hotgraph_server.text import ByteTokenizer
from tests.integration.harness import (
    PATIENCE_SECONDS,
    Caller,
    builder,
    eventually,
    letters,
    refused,
    serving,
    settings,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        yield Path(path)


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


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelLoadError("model.safetensors is damaged"), 78),
        (SettingsError("device and dtype contradict"), 78),
        (NotPossibleError("no such device"), 69),
        (AddressInUseError("taken"), 69),
    ],
)
async def test_load_error_ends_with_its_status_and_one_line(
    folder: Path, error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The supervisor learns from the status whether to try again; a person reads one line."""

    async def build(settings: Settings, clock: Clock) -> Parts:
        raise error

    assert await serve(settings(folder), build=build) == status
    lines = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [line.getMessage() for line in lines] == [str(error)]
    assert all(line.exc_info is None for line in lines)
    assert os.listdir(folder) == []


async def test_unexpected_load_error_is_raised_with_nothing_left_open(folder: Path) -> None:
    """A bug while loading is not dressed up as a setting; sockets are given back all the same."""

    async def build(settings: Settings, clock: Clock) -> Parts:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Daemon(settings(folder), build=build).run()
    assert os.listdir(folder) == []


async def test_engine_that_fails_to_start_is_closed(folder: Path) -> None:
    """What was built is closed even when it never served."""

    class Broken(FakeEngine):
        is_closed = False

        async def start(self) -> None:
            raise ModelLoadError("no room for the KV cache")

        async def close(self) -> None:
            self.is_closed = True

    engine = Broken()
    with pytest.raises(ModelLoadError):
        await Daemon(settings(folder), build=builder(engine)).run()
    assert engine.is_closed


async def test_signals_drain_and_then_end(folder: Path) -> None:
    """serve installs the handlers: SIGTERM once drains; the handlers are gone afterwards."""
    run = asyncio.create_task(serve(settings(folder)))
    async with Caller(f"unix:{folder}/s") as caller:
        await eventually(lambda: (folder / "s").is_socket())

        async def is_serving() -> bool:
            return (await caller.status()).model == "fake"

        await eventually(is_serving)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(run, PATIENCE_SECONDS) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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


async def test_profile_is_kept_from_one_life_to_the_next(folder: Path) -> None:
    """What was hot is written on stop and captured on the next start, before anyone asks."""
    path = folder / "profile.json"
    graphs = GraphSettings(profile=path)
    async with serving(graphs=graphs) as served:
        await served.inference.Complete(CompleteRequest(text="x", max_tokens=30))
    data = json.loads(path.read_text())
    assert data["model"] == "fake"
    assert [entry["key"] for entry in data["entries"]]
    assert [name for name in os.listdir(folder) if name != "profile.json"] == []
    async with serving(graphs=graphs) as served:
        ready = served.engine.graphs
        await eventually(lambda: ready.stats().num_ready == len(data["entries"]))
        assert ready.stats().num_misses == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1, "model": "fake", "entries": [{}]}',
        '{"format": 1, "model": "other", "entries": []}',
    ],
)
async def test_odd_profile_costs_speed_only(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """A profile that cannot be used is told and left out; the daemon serves."""
    path = folder / "profile.json"
    path.write_text(text)
    async with serving(graphs=GraphSettings(profile=path)) as served:
        assert "profile" in caplog.text
        await served.check_alive()


async def test_profile_that_cannot_be_written_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full or missing disk does not change how the daemon ends."""
    async with serving(graphs=GraphSettings(profile=folder / "none" / "profile.json")) as served:
        served.daemon.drain()
        assert await ended(served.run) is ExitStatus.OK
    assert "cannot be written" in caplog.text


async def test_engine_that_hangs_does_not_hold_up_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never returns: streams end, and the daemon with them, after a bounded time."""
    monkeypatch.setattr("hotgraph_server.daemon.CLOSE_SECONDS", 0.2)
    engine = FakeEngine(rule=letters)
    engine.hold_step(3)
    async with serving(engine=engine) as served:
        call = served.inference.Complete(CompleteRequest(text="x", max_tokens=10))
        waiting = asyncio.ensure_future(refused(call))
        await asyncio.wait_for(engine.wait_held(), PATIENCE_SECONDS)
        served.daemon.on_signal()
        served.daemon.on_signal()
        error = await waiting
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        await ended(served.run)
        engine.release()
        await engine.close()


async def test_fake_source_builds_an_engine_over_bytes(folder: Path) -> None:
    """The settings' sizes are the engine's, and every slot can hold a whole context."""
    asked = settings(folder, scheduler={"num_slots": 3})
    parts = await build_parts(asked, clock=None)  # type: ignore[arg-type]
    assert isinstance(parts.tokenizer, ByteTokenizer)
    assert parts.model_id == "fake"
    info = parts.engine.info
    assert (info.num_slots, info.context_length, info.max_step_tokens) == (3, 1024, 512)
    assert (info.num_blocks - 1) * info.block_size >= 3 * 1024


async def test_failed_listener_ends_the_life(folder: Path) -> None:
    """A daemon that cannot listen raises what is wrong and is stopped."""
    (folder / "s").write_text("in the way")
    daemon = Daemon(settings(folder))
    with pytest.raises(SettingsError):
        await daemon.run()
    assert daemon.lifecycle.state is DaemonState.STOPPED
