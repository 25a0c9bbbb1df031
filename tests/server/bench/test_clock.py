"""Tests of bench/clock.py."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from hotgraph_server.bench.clock import WallClock


@pytest.fixture
def clock() -> Iterator[WallClock]:
    clock = WallClock()
    yield clock
    clock.close()


async def test_a_wait_never_ends_early(clock: WallClock) -> None:
    """After a wait the moment has come, for long and short waits, and a past moment is no wait."""
    for seconds in (0.02, 0.004, 0.0005, -1.0):
        moment = clock.now() + seconds
        await clock.sleep_until(moment)
        assert clock.now() >= moment


async def test_waits_are_more_exact_than_a_timer(clock: WallClock) -> None:
    """The best of many waits is late by less than half a millisecond, which a timer of whole milliseconds cannot be."""
    late = []
    for number in range(20):
        moment = clock.now() + 0.0051 + number * 1e-5
        await clock.sleep_until(moment)
        late.append(clock.now() - moment)
    assert min(late) < 0.0005


async def test_others_run_meanwhile(clock: WallClock) -> None:
    """A short wait blocks nobody else on the loop."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    await clock.sleep_until(clock.now() + 0.002)
    task.cancel()
    assert ticks > 1


async def test_restart_makes_now_zero(clock: WallClock) -> None:
    """After a restart the clock counts from that moment."""
    await clock.sleep_until(0.01)
    before = time.perf_counter()
    clock.restart()
    assert clock.now() <= time.perf_counter() - before + 1e-4
