"""A scheduler on a fake engine, made to measure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest_asyncio

from hotgraph_server.config import SchedulerSettings
from hotgraph_server.engine.fake import FakeEngine
from hotgraph_server.request import FinishedEvent, Request, TokensEvent
from hotgraph_server.scheduler import RequestStream, Scheduler
from hotgraph_server.text import ByteTokenizer


@dataclass
class House:
    """A scheduler and what it runs on."""

    scheduler: Scheduler
    engine: FakeEngine


@dataclass
class Answer:
    """All that a stream gave, choices by index."""

    token_ids: dict[int, list[int]]
    text: dict[int, str]
    finished: FinishedEvent


async def read(stream: RequestStream) -> Answer:
    """Reads a stream to its end; checks that nothing comes after a choice's finish."""
    token_ids: dict[int, list[int]] = {}
    text: dict[int, str] = {}
    ended: set[int] = set()
    finished: FinishedEvent | None = None
    async with stream:
        async for event in stream:
            assert finished is None
            if isinstance(event, TokensEvent):
                assert event.choice_index not in ended
                token_ids.setdefault(event.choice_index, []).extend(event.token_ids)
                text[event.choice_index] = text.get(event.choice_index, "") + event.text
                if event.finish is not None:
                    ended.add(event.choice_index)
            else:
                finished = event
    assert finished is not None
    assert {finish.choice_index for finish in finished.choices} == ended
    return Answer(token_ids, text, finished)


MakeHouse = Callable[..., "AsyncIterator[House]"]


@pytest_asyncio.fixture
async def house() -> AsyncIterator[Callable[..., object]]:
    """Makes scheduler and engine: `await house(num_slots=2, settings={...}, ...)`; closes both at the end."""
    async with AsyncExitStack() as stack:

        async def make(*, settings: dict[str, object] | None = None, **engine_options: object) -> House:
            engine = FakeEngine(**engine_options)  # type: ignore[arg-type]
            await engine.start()
            stack.push_async_callback(engine.close)
            scheduler = Scheduler(engine, ByteTokenizer(), SchedulerSettings(**(settings or {})))  # type: ignore[arg-type]
            await scheduler.start()
            stack.push_async_callback(scheduler.close)
            return House(scheduler, engine)

        yield make


def request(request_id: str = "r", prompt: bytes = b"hello", max_tokens: int = 8, **changes: object) -> Request:
    """A request with a byte prompt."""
    return Request(request_id, tuple(prompt), max_tokens, **changes)  # type: ignore[arg-type]
