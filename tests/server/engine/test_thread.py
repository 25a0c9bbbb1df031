"""The forward thread runs jobs in order, hands back results and errors, and ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from hotgraph_server.engine.thread import Deferred, ForwardThread


@pytest.fixture
def thread() -> Iterator[ForwardThread]:
    """A started thread, closed at the end."""
    forward = ForwardThread()
    forward.start()
    yield forward
    forward.close()


async def test_results_and_errors_come_back_in_order(thread: ForwardThread) -> None:
    """Jobs run one after the other on the one thread; each future holds its own result or exception."""
    seen: list[tuple[int, str]] = []

    def job(number: int) -> int:
        seen.append((number, threading.current_thread().name))
        if number == 2:
            raise KeyError(number)
        return number * 10

    futures = [thread.submit(partial(job, number)) for number in range(4)]
    assert await futures[0] == 0
    with pytest.raises(KeyError):
        await futures[2]
    assert await futures[3] == 30
    assert await futures[1] == 10
    assert seen == [(number, "forward") for number in range(4)]


async def test_cancelled_future_does_not_stop_the_thread(thread: ForwardThread) -> None:
    """The work of a cancelled future runs, and the thread goes on."""
    gate = threading.Event()
    ran = threading.Event()
    blocked = thread.submit(lambda: gate.wait(30))
    doomed = thread.submit(ran.set)
    doomed.cancel()
    gate.set()
    assert await blocked
    assert await thread.submit(lambda: "on") == "on"
    assert ran.is_set()


async def test_call_waits_from_another_thread(thread: ForwardThread) -> None:
    """`call` gives the result or raises the error in the calling thread; on the forward thread itself it just runs."""
    assert await asyncio.to_thread(thread.call, lambda: thread.after_launched(lambda: thread.is_current))
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(thread.call, lambda: thread.after_launched(lambda: 1 // 0))
    assert await thread.submit(lambda: thread.call(lambda: Deferred(lambda: 5))) == 5


async def test_closed_thread_takes_no_work(thread: ForwardThread) -> None:
    """close lets queued jobs finish, may be called twice, and work given later is refused."""
    done = thread.submit(lambda: 1)
    await asyncio.to_thread(thread.close)
    assert await done == 1
    thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(lambda: 2)
    with pytest.raises(RuntimeError, match="closed"):
        thread.call(lambda: Deferred(lambda: 2))


def test_loop_that_ended_early_does_not_kill_the_thread() -> None:
    """A result for an event loop that is gone is dropped; later work runs."""
    forward = ForwardThread()
    forward.start()
    gate = threading.Event()

    async def leave() -> None:
        forward.submit(lambda: gate.wait(30))

    asyncio.run(leave())
    gate.set()
    assert forward.call(lambda: Deferred(lambda: 7)) == 7
    forward.close()


async def test_deferred_work_gives_its_result_at_its_end(thread: ForwardThread) -> None:
    """What work launches is waited for and read after it, by `submit` and by `call`, and its errors are the work's."""
    order: list[str] = []

    def launch() -> Deferred[str]:
        order.append("launched")
        return thread.after_launched(read)

    def read() -> str:
        order.append("read")
        return "result"

    assert await thread.launch(launch) == "result"
    assert await asyncio.to_thread(thread.call, launch) == "result"
    assert order == ["launched", "read"] * 2

    def fail() -> Deferred[int]:
        return thread.after_launched(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        await thread.launch(fail)
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(thread.call, fail)
