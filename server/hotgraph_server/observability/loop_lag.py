"""How late the event loop comes round: whatever blocks it, blocks every caller."""

from __future__ import annotations

import asyncio
from typing import Final

from hotgraph_server.observability.requests import distribution

INTERVAL_SECONDS: Final = 0.1


class LoopLag:
    """Asks to be called ten times a second, and notes how much later that was. Made on the event loop."""

    def __init__(self) -> None:
        self.lag = distribution("hotgraph_event_loop_lag_seconds")
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
        self.lag.add(max(0.0, self._loop.time() - self._due))
        self.start()
