"""What those who are served are doing: whether steps are under way, and when one ends. The serving side tells it, lock-free."""

from __future__ import annotations

import threading
from collections import deque

from graphcache.clock import Clock

IDLE_SECONDS = 0.25  # without a recorded step: nobody is being served, where only records tell
BREAK_SECONDS = 0.02  # between the end of a step and the next launch, where launches are told too: serving goes on
TURN_SHARE = 0.05  # of a step, that what runs beside it may take before it waits for the next
IDLE_TURN_SECONDS = 1e-3  # of the device, at once, while nobody is served: whoever comes then waits for no more


class Pulse:
    """Steps as they are launched, finished and recorded.

    `launched` is for one thread, `finished` for one, maybe another. Who never calls them is taken to serve for a while after
    each `recorded`, which is less exact.
    """

    def __init__(self, clock: Clock) -> None:
        self._monotonic = clock.monotonic
        self._is_told = False  # of launches
        self._launches: deque[float] = deque()  # times of those that are not over; its append and popleft are atomic
        self._last_monotonic: float | None = None  # of the newest end or record
        self._step_seconds = 0.0  # of the newest step, without the time it waited for the one before
        self._ended: threading.Event | None = None  # of whoever waits
        self._turn_monotonic = 0.0  # when the capture thread last waited

    @property
    def is_serving(self) -> bool:
        """Whether a step is under way, or was just now."""
        return self._serving_seconds() > 0

    def launched(self) -> None:
        """A step begins."""
        self._is_told = True
        self._launches.append(self._monotonic())

    def finished(self) -> None:
        """The oldest step that was launched is over, or was given up."""
        last = self._last_monotonic
        begin = self._launches[0]
        self._end(begin if last is None else max(begin, last))
        self._launches.popleft()

    def recorded(self, seconds: float | None) -> float:
        """A step was counted as a hit or a miss; returns the time. `seconds`: what it took, if that is known."""
        now = self._monotonic()
        return now if self._is_told else self._end(None if seconds is None else now - seconds)

    def take_turn(self) -> None:
        """For the capture thread, between parts of its work: returns when it may go on.

        That is at once while nobody is served, or little time has passed since the last turn; else when a step has ended.
        """
        seconds = self._serving_seconds()
        if not seconds or self._monotonic() - self._turn_monotonic < TURN_SHARE * self._step_seconds:
            return
        ended = threading.Event()
        self._ended = ended
        ended.wait(seconds)
        self._ended = None
        self._turn_monotonic = self._monotonic()

    def turn_seconds(self) -> float:
        """How much of the device's time what runs beside those who are served may take before it waits."""
        return TURN_SHARE * self._step_seconds if self.is_serving else IDLE_TURN_SECONDS

    def _serving_seconds(self) -> float:
        """How long it will be taken that somebody is served, unless there is another step; 0 for nobody."""
        if self._launches:
            return IDLE_SECONDS
        last = self._last_monotonic
        if last is None:
            return 0.0
        return max(0.0, last + (BREAK_SECONDS if self._is_told else IDLE_SECONDS) - self._monotonic())

    def _end(self, begin: float | None) -> float:
        self._last_monotonic = now = self._monotonic()
        if begin is not None:
            self._step_seconds = now - begin
        ended = self._ended
        if ended is not None:
            ended.set()
        return now
