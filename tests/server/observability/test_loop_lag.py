"""How late the event loop comes round: counted, and told when it was long and somebody is served."""

from __future__ import annotations

import asyncio
import time

import pytest

from hotgraph_server.observability.loop_lag import INTERVAL_SECONDS, TOLD_SECONDS, LoopLag


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_blocked_loop(caplog: pytest.LogCaptureFixture, is_told: bool) -> None:
    """What blocks the loop for long is one observation of that length and one line; no line while nobody is to be told."""
    lag = LoopLag(is_told=lambda: is_told)
    lag.start()
    try:
        await asyncio.sleep(3 * INTERVAL_SECONDS)
        caplog.clear()
        total = lag.lag.total
        time.sleep(TOLD_SECONDS + 2 * INTERVAL_SECONDS)  # noqa: ASYNC251  (what it is about)
        await asyncio.sleep(2 * INTERVAL_SECONDS)
    finally:
        lag.stop()
    assert lag.lag.total - total >= TOLD_SECONDS
    assert [record.msg for record in caplog.records] == ["the event loop was blocked for %.2f s"] * is_told


async def test_it_stops() -> None:
    """After its end it looks no more; the end may come twice, and before a start."""
    lag = LoopLag()
    lag.stop()
    lag.start()
    await asyncio.sleep(2 * INTERVAL_SECONDS)
    lag.stop()
    lag.stop()
    before = lag.lag.buckets()
    await asyncio.sleep(3 * INTERVAL_SECONDS)
    assert lag.lag.buckets() == before
