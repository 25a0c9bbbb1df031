"""How late the event loop comes round: whatever blocks it, blocks every caller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from hotgraph_server.observability.requests import distribution

logger = logging.getLogger("hotgraph.observability")

INTERVAL_SECONDS: Final = 0.1
TOLD_SECONDS: Final = 0.25  # from here on it is told; the alert of a blocked event loop has the same limit


class LoopLag:
    """Asks to be called ten times a second, and notes how much later that was; the log hears of it when it was long and
    `is_told` says so then. Made on the event loop."""

    def __init__(self, *, is_told: Callable[[], bool] = lambda: True) -> None:
        self.lag = distribution("hotgraph_event_loop_lag_seconds")
        self._is_told = is_told
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = self._loop.time() + INTERVAL_SECONDS
        self._timer = self._loop.call_at(self._due, self._beat)

    def stop(self) -> None:
        """May be called again, and without a start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        late_seconds = max(0.0, self._loop.time() - self._due)
        self.lag.add(late_seconds)
        if late_seconds >= TOLD_SECONDS and self._is_told():
            logger.warning("the event loop was blocked for %.2f s", late_seconds)
        self.start()
