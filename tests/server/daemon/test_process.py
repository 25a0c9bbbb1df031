"""The daemon as a process: signals end it, and the exit status says how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from graphcache import Clock
from hotgraph_server.config import Settings
from hotgraph_server.daemon import Parts, serve
from hotgraph_server.errors import AddressInUseError, ModelLoadError, NotPossibleError, SettingsError
from tests.integration.harness import PATIENCE_SECONDS, Caller, eventually, settings


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
