"""Fixtures for the cache's tests: a clock that stands still, a fake backend and program, and caches without a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graphcache import CacheSettings, FakeBackend, FakeClock, FakeProgram, GraphCache

MakeCache = Callable[..., GraphCache[str]]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def backend(clock: FakeClock) -> FakeBackend:
    return FakeBackend(clock, size_bytes=100, record_seconds=0.007, instantiate_seconds=0.003)


@pytest.fixture
def program(clock: FakeClock) -> FakeProgram:
    return FakeProgram(clock)


@pytest.fixture
def make_cache(clock: FakeClock, backend: FakeBackend, program: FakeProgram) -> Iterator[MakeCache]:
    """Makes started caches of 1,000 bytes without a thread unless told otherwise; closes them at the end."""
    caches: list[GraphCache[str]] = []

    def make(*, thread: bool = False, **settings: Any) -> GraphCache[str]:
        settings.setdefault("budget_bytes", 1000)
        cache: GraphCache[str] = GraphCache(program, backend, CacheSettings(**settings), clock=clock, thread=thread)
        caches.append(cache)
        cache.start()
        return cache

    yield make
    for cache in caches:
        cache.close()


@pytest.fixture
def cache(make_cache: MakeCache) -> GraphCache[str]:
    return make_cache()
