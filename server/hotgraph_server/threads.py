"""Blocking work beside the event loop that cannot keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


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
