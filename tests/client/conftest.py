"""Fixtures of the client's tests: a scripted server on a Unix socket, and both clients connected to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from hotgraph_client import ResumePolicy
from tests.client.drivers import Driver, connected
from tests.client.scripted_server import ScriptedServer, serving

FAST = ResumePolicy(first_backoff_seconds=0.01, max_backoff_seconds=0.05)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
async def server(socket_path: Path) -> AsyncIterator[ScriptedServer]:
    """A scripted server at `socket_path`."""
    scripted = ScriptedServer()
    async with serving(scripted, f"unix:{socket_path}"):
        yield scripted


@pytest.fixture(params=["async", "sync"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which client."""
    return str(request.param)


@pytest.fixture
async def connect(kind: str, socket_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes a driver of the client with settings; the target is the scripted server's."""
    async with AsyncExitStack() as stack:

        async def make(target: str | None = None, **settings: Any) -> Driver:
            settings.setdefault("resume_policy", FAST)
            return await stack.enter_async_context(connected(kind, target or f"unix:{socket_path}", **settings))

        yield make


@pytest.fixture
async def driver(server: ScriptedServer, connect: Callable[..., Any]) -> Driver:
    """A driver with default settings."""
    made: Driver = await connect()
    return made
