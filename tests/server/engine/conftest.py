"""Engines for tests, closed at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest_asyncio

from graphcache import Backend, Clock
from hotgraph_server.config import GraphSettings, KvCacheSettings, ModelSettings, SchedulerSettings, Settings
from hotgraph_server.engine import TorchEngine
from tests.server.engine.tiny_model import Tiny, TinyModel

MakeEngine = Callable[..., Awaitable[TorchEngine]]


def tiny_settings(
    *,
    num_slots: int = 8,
    max_step_tokens: int = 48,
    block_size: int = 4,
    num_blocks: int = 400,
    padding: str = "auto",
    max_padding_ratio: float = 2.0,
    max_context: int | None = None,
) -> Settings:
    """Settings for the tiny model: a block of it takes 256 bytes a token."""
    return Settings(
        model=ModelSettings(source="tiny", num_threads=1, max_context=max_context),
        scheduler=SchedulerSettings(num_slots=num_slots, max_step_tokens=max_step_tokens),
        kv_cache=KvCacheSettings(size_bytes=num_blocks * block_size * 256, block_size=block_size),
        graphs=GraphSettings(padding=padding, max_padding_ratio=max_padding_ratio),  # type: ignore[arg-type]
    )


@pytest_asyncio.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    """Makes and starts engines: `await make_engine(model, padding="always", run_ahead=1, ...)`."""
    async with AsyncExitStack() as stack:

        async def make(
            model: TinyModel | None = None,
            *,
            backend: Backend | None = None,
            clock: Clock | None = None,
            run_ahead: int = 0,
            **settings: object,
        ) -> TorchEngine:
            engine = TorchEngine(
                Tiny(model or TinyModel()),
                tiny_settings(**settings),  # type: ignore[arg-type]
                backend=backend,
                clock=clock,
                run_ahead=run_ahead,
            )
            await engine.start()
            stack.push_async_callback(engine.close)
            return engine

        yield make
