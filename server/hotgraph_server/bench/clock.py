"""The clock of a run: seconds since its start, and waiting more exactly than an event loop's timer does."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

_TIMER_SECONDS = 0.003  # event loops round their timers up to whole milliseconds


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the start of the run."""
        ...

    async def sleep_until(self, moment: float) -> None:
        """Returns at or just after `moment`; at once when it is past."""
        ...


class WallClock:
    """Real time. The last milliseconds of a wait are slept in a thread, by the kernel's timer: late by about 0.1 ms.

    Create it inside the event loop; `close` ends its thread.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._sleeper = ThreadPoolExecutor(4, thread_name_prefix="bench-clock")

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def sleep_until(self, moment: float) -> None:
        if (left := moment - self.now()) > _TIMER_SECONDS:
            await asyncio.sleep(left - _TIMER_SECONDS)
        if (left := moment - self.now()) > 0:
            await asyncio.get_running_loop().run_in_executor(self._sleeper, time.sleep, left)

    def restart(self) -> None:
        """Makes this moment 0."""
        self._start = time.perf_counter()

    def close(self) -> None:
        self._sleeper.shutdown(wait=False)
