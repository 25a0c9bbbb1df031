"""The event loop that serves, and blocking work beside it that cannot keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import uvloop

Result = TypeVar("Result")

# How long a thread that computes in Python may keep the others waiting: captures record in one, beside those that serve.
SWITCH_INTERVAL_SECONDS: Final = 0.0005


def run_event_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs `main` on a uvloop of its own, in a process whose threads take turns as often as serving needs it."""
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def in_daemon_thread(work: Callable[[], Result], *, name: str = "hotgraph-blocking") -> Result:
    """Runs blocking work in a thread of its own, and raises what it raises.

    Unlike `asyncio.to_thread`, whose threads are joined at the end of the loop and of the process, it does not keep either
    alive when nobody waits any more.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def finish(result: Result | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only with an error

    def body() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=body, name=name, daemon=True).start()
    return await done
