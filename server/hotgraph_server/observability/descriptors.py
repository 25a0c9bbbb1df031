"""Whether file descriptors run out, for the log. Metrics have their numbers from Prometheus's own library."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from typing import Final

logger = logging.getLogger("hotgraph.observability")

INTERVAL_SECONDS: Final = 1.0
FEW_RATIO: Final = 0.8  # of the limit; the alert has the same
ENOUGH_RATIO: Final = 0.7  # below it, it is over


class Descriptors:
    """Looks once a second, and tells once each time that few are left. Made on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._are_few = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(INTERVAL_SECONDS, self._look)

    def stop(self) -> None:
        """May be called again, and without a start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = _num_open(limit)
        if not self._are_few and num_open > FEW_RATIO * limit:
            self._are_few = True
            logger.warning("file descriptors run out: %d of %d are open", num_open, limit)
        elif self._are_few and num_open < ENOUGH_RATIO * limit:
            self._are_few = False
            logger.info("file descriptors are to be had again: %d of %d are open", num_open, limit)
        self.start()


def _num_open(limit: int) -> int:
    """At least so many are open: a new one gets the lowest number that is free. Counting them would take milliseconds where
    there are thousands."""
    try:
        number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return limit
    os.close(number)
    return number
