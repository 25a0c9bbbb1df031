"""The limit of a write: who is late, who is not, and who was cancelled by somebody else."""

from __future__ import annotations

import asyncio
import time

import pytest

from hotgraph_server.errors import ServerTimeLimitError
from hotgraph_server.rpc.writes import WriteLimit


async def test_a_write_that_is_not_taken_ends() -> None:
    """It ends with the server's time limit, within its time and a little, and its task goes on."""
    limit = WriteLimit(0.1)
    begin = time.monotonic()
    with pytest.raises(ServerTimeLimitError):
        await limit.write(asyncio.Event().wait())  # type: ignore[arg-type]  # of no result
    assert 0.1 <= time.monotonic() - begin < 1.0
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_writes_in_time_are_left_alone() -> None:
    """Many short ones, one after the other for longer than the limit and side by side, all pass."""
    limit = WriteLimit(0.1)

    begin = time.monotonic()

    async def writer() -> None:
        for _ in range(30):
            await limit.write(asyncio.sleep(0.01))

    await asyncio.gather(*(writer() for _ in range(10)))
    assert time.monotonic() - begin > 0.2


async def test_only_the_late_one_ends() -> None:
    """Beside one that is stuck others begin and end as ever, also after it."""
    limit = WriteLimit(0.1)
    stuck = asyncio.ensure_future(limit.write(asyncio.Event().wait()))  # type: ignore[arg-type]  # as above
    while not stuck.done():
        await limit.write(asyncio.sleep(0.005))
    with pytest.raises(ServerTimeLimitError):
        stuck.result()
    await asyncio.sleep(0.05)  # the timer finds nobody and rests
    with pytest.raises(ServerTimeLimitError):
        await limit.write(asyncio.Event().wait())  # type: ignore[arg-type]  # as above


async def test_a_cancellation_stays_one() -> None:
    """Who is cancelled by somebody else is cancelled, early and late."""
    limit = WriteLimit(0.1)
    for seconds in (0.0, 0.05):
        task = asyncio.ensure_future(limit.write(asyncio.Event().wait()))  # type: ignore[arg-type]  # as above
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_both_at_once_is_a_cancellation() -> None:
    """A task that is cancelled in the same turn as its write is late is cancelled: whoever did that waits for it."""
    limit = WriteLimit(0.1)
    task = asyncio.ensure_future(limit.write(asyncio.Event().wait()))  # type: ignore[arg-type]  # as above
    while not task.cancelling():  # noqa: ASYNC110 what is waited for is the limit's own timer
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_write_is_its_own() -> None:
    """What a write raises comes through."""

    async def broken() -> None:
        raise ConnectionError("gone")

    limit = WriteLimit(0.1)
    with pytest.raises(ConnectionError, match="gone"):
        await limit.write(broken())
