"""A time for each message to be taken: who does not read keeps neither a slot nor blocks.

It knows no message. There is one timer for all writes under way: one for each would cost microseconds a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

from hotgraph_server.errors import ServerTimeLimitError

CHECKS_PER_LIMIT: Final = 10  # so a write ends within a tenth more than its limit


class WriteLimit:
    """Ends writes that take longer than `seconds`. Event loop's thread only; one write at a time in a task."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun: dict[asyncio.Task[object], float] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, writing: Awaitable[None]) -> None:
        """Waits for it. Raises ServerTimeLimitError when its time is over."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._begun[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / CHECKS_PER_LIMIT, self._check, loop)
        try:
            await writing
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() == 0:  # by nobody else besides
                raise ServerTimeLimitError("the server's time limit for one event to be read passed") from None
            raise
        finally:
            del self._begun[task]
            self._late.discard(task)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if not self._begun:
            return  # the next write sets it again
        now = loop.time()
        for task, begin in self._begun.items():
            if now - begin >= self._seconds and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._timer = loop.call_later(self._seconds / CHECKS_PER_LIMIT, self._check, loop)
