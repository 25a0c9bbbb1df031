"""Following the cache's events on the loop: in order, without gaps, and without holding up whoever makes them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from graphcache import CacheSettings, EagerBackend, EventType, GraphCache
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.errors import DrainingError, EventsGoneError
from hotgraph_server.rpc.watch import EventHub
from tests.integration.harness import PATIENCE_SECONDS

KEY = StepKey(1, 1, Sampler.GREEDY)


class Program:
    """Captures nothing."""

    def bind(self, key: StepKey) -> Any:
        return lambda: None

    def verify(self, key: StepKey, replay: Any) -> bool:
        return True


@pytest_asyncio.fixture
async def cache() -> AsyncIterator[GraphCache[StepKey]]:
    cache: GraphCache[StepKey] = GraphCache(Program(), EagerBackend(), CacheSettings(max_events=10), thread=False)
    cache.start()
    yield cache
    cache.close()


async def gathered(events: AsyncIterator[Any], count: int) -> list[int]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [(await anext(events)).sequence for _ in range(count)]


def make_events(cache: GraphCache[StepKey], count: int) -> None:
    for _ in range(count):
        cache.update_budget(limit_bytes=1 << 20)


async def test_events_from_another_thread_arrive_in_order(cache: GraphCache[StepKey]) -> None:
    """A follower that keeps up misses nothing, whichever threads make the events."""
    hub = EventHub(cache)
    events = hub.follow(None)
    reader = asyncio.ensure_future(gathered(events, 6))
    await asyncio.sleep(0)
    threads = [threading.Thread(target=make_events, args=(cache, 3)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert await reader == [1, 2, 3, 4, 5, 6]
    for thread in threads:
        thread.join()
    hub.close()


async def test_zero_starts_with_what_is_kept(cache: GraphCache[StepKey]) -> None:
    """From 0 a follower gets the oldest event that is there, gap or not, and goes on."""
    make_events(cache, 25)
    hub = EventHub(cache)
    events = hub.follow(0)
    assert await gathered(events, 10) == list(range(16, 26))
    make_events(cache, 1)
    assert await gathered(events, 1) == [26]
    hub.close()


@pytest.mark.parametrize("after", [1, 14, 26, 1 << 62])
async def test_sequences_that_are_not_kept_are_gone(cache: GraphCache[StepKey], after: int) -> None:
    """Too old or never made: EventsGoneError with what there is."""
    make_events(cache, 25)
    hub = EventHub(cache)
    with pytest.raises(EventsGoneError) as caught:
        await anext(hub.follow(after))
    assert caught.value.metadata == {"oldest_sequence": "16", "last_sequence": "25"}
    hub.close()


@pytest.mark.parametrize("begin", [0, 3])
async def test_follower_that_falls_behind_is_told(cache: GraphCache[StepKey], begin: int) -> None:
    """More events than are kept while it was busy: EventsGoneError, never a silent gap, even from the very beginning."""
    make_events(cache, begin)
    hub = EventHub(cache)
    events = hub.follow(None)
    reader = asyncio.ensure_future(gathered(events, 1))
    await asyncio.sleep(0)
    make_events(cache, 1)
    await reader
    make_events(cache, 11)
    with pytest.raises(EventsGoneError):
        await anext(events)
    hub.close()


async def test_closing_ends_followers_and_waits(cache: GraphCache[StepKey]) -> None:
    """Everyone hears that the server stops; events made later wake nobody."""
    hub = EventHub(cache)
    follower = asyncio.ensure_future(gathered(hub.follow(None), 1))
    waiter = asyncio.ensure_future(hub.news())
    await asyncio.sleep(0)
    hub.close()
    for task in (follower, waiter):
        with pytest.raises(DrainingError):
            await asyncio.wait_for(task, PATIENCE_SECONDS)
    with pytest.raises(DrainingError):
        await hub.news()
    cache.request(KEY)
    assert cache.events(0)[-1].type is EventType.PLANNED
