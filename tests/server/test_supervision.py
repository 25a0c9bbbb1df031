"""What feeds the watchdog and what does not, and what a service manager hears of a daemon's life."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphcache import SystemClock
from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.config import SchedulerSettings, ServerSettings, Settings
from hotgraph_server.daemon import Daemon, serve
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import ModelLoadError, SettingsError
from hotgraph_server.rpc import Lifecycle
from hotgraph_server.scheduler import self_test
from hotgraph_server.supervision import MAX_LATE_SECONDS, Heartbeat, Progress, Supervision
from hotgraph_server.systemd import Notifier
from tests.integration.harness import Caller, builder, eventually, settings


class Told(Notifier):
    """Remembers what it is told."""

    def __init__(self, watchdog_seconds: float | None = None) -> None:
        super().__init__(None, watchdog_seconds)
        self.messages: list[dict[str, str]] = []

    @property
    def is_listened_to(self) -> bool:
        return True

    def _send(self, **fields: str) -> None:
        self.messages.append(fields)

    def named(self, name: str) -> list[str]:
        return [message[name] for message in self.messages if name in message]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        yield Path(path)


@pytest.mark.parametrize(
    ("moved_at", "late_seconds", "is_alive"),
    [
        (None, 0.0, True),  # nothing to do
        (10.0, 0.0, True),  # a step began or ended since the last beat
        (9.9, 0.0, False),  # the same step as at the last beat
        (None, MAX_LATE_SECONDS + 0.1, False),  # the loop was held up
        (11.0, MAX_LATE_SECONDS + 0.1, False),
    ],
)
def test_heartbeat(moved_at: float | None, late_seconds: float, is_alive: bool) -> None:
    """It beats while the loop is in time and the engine, if it has steps, has moved since the last beat."""
    heartbeat = Heartbeat(10.0)
    assert heartbeat.beats(11.0, late_seconds=late_seconds, engine_moved_at=moved_at) is is_alive


def test_heartbeat_comes_back() -> None:
    """A step that was long but ended is forgiven."""
    heartbeat = Heartbeat(10.0)
    assert [heartbeat.beats(now, late_seconds=0.0, engine_moved_at=9.0) for now in (11.0, 12.0)] == [False, False]
    assert heartbeat.beats(13.0, late_seconds=0.0, engine_moved_at=12.5)


def test_progress(tmp_path: Path) -> None:
    """Computing and reading are progress, waiting is not."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    progress = Progress()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert progress.has_moved()
    time.sleep(0.2)
    assert not progress.has_moved()
    file.read_bytes()
    assert progress.has_moved()


async def beats(watchdog_seconds: float | None, moved_at: float | None, seconds: float) -> Told:
    told = Told(watchdog_seconds)
    supervision = Supervision(
        told, Lifecycle(), clock=SystemClock(), describe=lambda: "as ever", engine_moved_at=lambda: moved_at
    )
    supervision.start()
    await asyncio.sleep(seconds)
    await supervision.stop()
    return told


async def test_watchdog_is_fed() -> None:
    """Several times within the watchdog's time while the engine is idle; the same status is told once."""
    told = await beats(0.4, None, 0.4)
    assert len(told.named("WATCHDOG")) >= 4
    assert told.named("STATUS") == ["as ever"]


async def test_watchdog_is_not_fed_beside_a_step_that_hangs() -> None:
    """A step that began before the first beat and never ends stops the signs of life, while the loop is well."""
    told = await beats(0.4, time.monotonic() - 1, 0.4)
    assert told.named("WATCHDOG") == []


async def test_watchdog_that_is_off() -> None:
    """Without WatchdogSec nothing is fed."""
    assert (await beats(None, None, 0.1)).named("WATCHDOG") == []


async def test_life(folder: Path) -> None:
    """Loading, ready after a self-test that leaves no count, a reload between, stopping with the time that it may take."""
    told, wanted, engine = Told(), settings(folder), FakeEngine()
    changed = wanted.model_copy(
        update={
            "server": ServerSettings(listen=wanted.server.listen, drain_grace_seconds=7.0, reflection=False),
            "scheduler": SchedulerSettings(max_waiting=3),
        }
    )
    reloads: list[Any] = [changed, SettingsError("no such setting")]

    def load() -> Settings:
        next_one = reloads.pop(0)
        if isinstance(next_one, Exception):
            raise next_one
        assert isinstance(next_one, Settings)
        return next_one

    run = asyncio.create_task(serve(wanted, build=builder(engine), load=load, notifier=told))
    await eventually(lambda: told.named("READY"))
    assert len(engine.batches) >= 4
    async with Caller(f"unix:{folder}/s") as caller:
        status = (await caller.status()).scheduler
        assert (status.num_requests, status.num_steps, status.num_completion_tokens) == (0, 0, 0)
        signal.raise_signal(signal.SIGHUP)
        await eventually(lambda: len(told.named("READY")) == 2)
        assert (await caller.status()).scheduler.max_waiting == 3
        assert "a restart would change server.reflection" in told.messages[-1]["STATUS"]
        signal.raise_signal(signal.SIGHUP)
        await eventually(lambda: len(told.named("READY")) == 3)
        assert "reload refused: no such setting" in told.messages[-1]["STATUS"]
        assert (await caller.status()).scheduler.max_waiting == 3
        await caller.inference.Complete(CompleteRequest(text="x", max_tokens=2))
    signal.raise_signal(signal.SIGTERM)
    assert await run == 0
    order = [name for message in told.messages for name in message if name in ("READY", "RELOADING", "STOPPING")]
    assert order == ["READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING"]
    stopping = next(message for message in told.messages if "STOPPING" in message)
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 7_000_000
    assert stopping["STATUS"].startswith("draining")


async def test_engine_that_fails_its_self_test(folder: Path) -> None:
    """It never counts as ready: status 70, for another try, and the reason is told."""
    told, engine = Told(), FakeEngine()
    engine.fail_step(1)
    assert await serve(settings(folder), build=builder(engine), notifier=told) == 70
    assert told.named("READY") == []


async def test_model_that_fails_its_self_test(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logits that are not finite stay so: status 78, and no other try."""
    told, engine = Told(), FakeEngine()
    engine.fail_rows(0, [0])
    assert await serve(settings(folder), build=builder(engine), notifier=told) == 78
    assert told.named("READY") == []
    assert "not finite" in told.messages[-1]["STATUS"]
    assert "not finite" in caplog.text


async def test_engine_that_hangs_in_its_self_test(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after the limit, with status 70."""
    assert self_test.__kwdefaults__ is not None
    monkeypatch.setitem(self_test.__kwdefaults__, "limit_seconds", 0.1)
    monkeypatch.setattr("hotgraph_server.daemon.model_host.CLOSE_SECONDS", 0.1)
    told, engine = Told(), FakeEngine()
    engine.hold_step(0)
    assert await serve(settings(folder), build=builder(engine), notifier=told) == 70
    assert told.named("READY") == []
    engine.release()
    await engine.close()


async def test_error_is_the_last_status(folder: Path) -> None:
    """Why a daemon did not start stands in the manager's status line."""

    async def build(settings: Settings, clock: object) -> Any:
        raise ModelLoadError("no such model")

    told = Told()
    assert await serve(settings(folder), build=build, notifier=told) == 78
    assert told.messages[-1] == {"STATUS": "no such model"}


async def test_reload_while_loading_is_no_ready(folder: Path) -> None:
    """A reload before the model is there changes settings and says nothing of being ready."""
    told, may_load = Told(), asyncio.Event()

    async def build(settings: Settings, clock: Any) -> Any:
        await may_load.wait()
        return await builder(FakeEngine())(settings, clock)

    wanted = settings(folder)
    daemon = Daemon(wanted, build=build, notifier=told)
    run = asyncio.create_task(daemon.run())
    await eventually(lambda: daemon.describe().startswith("loading"))
    changed = wanted.model_copy(update={"scheduler": SchedulerSettings(max_waiting=3)})
    await daemon.reload(lambda: changed)
    assert told.named("READY") == told.named("RELOADING") == []
    may_load.set()
    await eventually(lambda: told.named("READY"))
    async with Caller(f"unix:{folder}/s") as caller:
        assert (await caller.status()).scheduler.max_waiting == 3
    daemon.drain()
    await run
