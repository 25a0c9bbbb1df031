"""Time, passed in so that tests own it. Nothing else in the library asks the system what time it is."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one for measuring, one for telling people."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean something."""
        ...

    def time(self) -> float:
        """Seconds since the epoch."""
        ...


class SystemClock:
    """The real one. The system's own functions, since the hot path reads the clock at every step."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


class FakeClock:
    """Stands still until it is advanced. Any thread may advance it."""

    def __init__(self, start_time: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._start_time = start_time
        self._elapsed_seconds = 0.0

    def __repr__(self) -> str:
        return f"FakeClock({self._elapsed_seconds:g} s in)"

    def monotonic(self) -> float:
        return self._elapsed_seconds

    def time(self) -> float:
        return self._start_time + self._elapsed_seconds

    def advance(self, seconds: float) -> None:
        """Moves both clocks on. Raises ValueError when `seconds` is negative."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        with self._lock:
            self._elapsed_seconds += seconds
