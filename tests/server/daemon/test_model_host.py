"""The model is brought up in order and ended in time, and what was hot is kept."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import grpc
import pytest

from graphcache import Clock
from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.config import GraphSettings, Settings
from hotgraph_server.daemon import Daemon, ExitStatus, Parts
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import ModelLoadError
from tests.integration.harness import PATIENCE_SECONDS, builder, eventually, letters, refused, serving, settings


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


async def test_reload_while_the_model_loads_holds(folder: Path) -> None:
    """What a reload changed before the scheduler was there is what the scheduler gets."""
    may_go_on, is_building = asyncio.Event(), asyncio.Event()
    engine = FakeEngine()

    async def build(settings: Settings, clock: Clock) -> Parts:
        is_building.set()
        await may_go_on.wait()
        return await builder(engine)(settings, clock)

    daemon = Daemon(settings(folder), build=build)
    run = asyncio.create_task(daemon.run())
    await asyncio.wait_for(is_building.wait(), PATIENCE_SECONDS)
    await daemon.reload(lambda: settings(folder, scheduler={"max_waiting": 7}))
    may_go_on.set()
    served = await eventually(lambda: daemon.lifecycle.served)
    assert served.scheduler.status().max_waiting == 7
    daemon.drain(0.0)
    assert await asyncio.wait_for(run, PATIENCE_SECONDS) is ExitStatus.OK


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
        assert await asyncio.wait_for(served.run, PATIENCE_SECONDS) is ExitStatus.OK
    assert "cannot be written" in caplog.text


async def test_engine_that_hangs_does_not_hold_up_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never returns: streams end, and the daemon with them, after a bounded time."""
    monkeypatch.setattr("hotgraph_server.daemon.model_host.CLOSE_SECONDS", 0.2)
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
        await asyncio.wait_for(served.run, PATIENCE_SECONDS)
        engine.release()
        await engine.close()
