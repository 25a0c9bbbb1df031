"""What those who are served are doing: whether steps are under way, and when one ends. The serving side tells it, lock-free."""

from __future__ import annotations

import threading

from graphcache.clock import Clock

IDLE_SECONDS = 0.25  # without a recorded step: nobody is being served, where only records tell
BREAK_SECONDS = 0.02  # between the end of a step and the next launch, where launches are told too: serving goes on


class Pulse:
    """Steps as they are launched, finished and recorded.

    `launched` is for one thread, `finished` for one, maybe another. Who never calls them is taken to serve for a while after
    each `recorded`, which is less exact.
    """

    def __init__(self, clock: Clock) -> None:
        self._monotonic = clock.monotonic
        self._num_launched = 0
        self._num_finished = 0
        self._last_monotonic: float | None = None  # of the newest end or record
        self._ended: threading.Event | None = None  # of whoever waits

    @property
    def is_serving(self) -> bool:
        """Whether a step is under way, or was just now."""
        return self._serving_seconds() > 0

    def _serving_seconds(self) -> float:
        """How long it will be taken that somebody is served, unless there is another step; 0 for nobody."""
        if self._num_launched != self._num_finished:
            return IDLE_SECONDS
        last = self._last_monotonic
        if last is None:
            return 0.0
        return max(0.0, last + (BREAK_SECONDS if self._num_launched else IDLE_SECONDS) - self._monotonic())

    def launched(self) -> None:
        """A step begins."""
        self._num_launched += 1

    def finished(self) -> None:
        """The oldest step that was launched is over, or was given up."""
        self._num_finished += 1
        self._end()

    def recorded(self) -> float:
        """A step was counted as a hit or a miss; returns the time."""
        if self._num_launched:
            return self._monotonic()
        return self._end()

    def wait_for_end(self) -> None:
        """Returns when a step ended since the call, or nobody is served. For the capture thread."""
        seconds = self._serving_seconds()
        if not seconds:
            return
        ended = threading.Event()
        self._ended = ended
        ended.wait(seconds)
        self._ended = None

    def _end(self) -> float:
        self._last_monotonic = now = self._monotonic()
        ended = self._ended
        if ended is not None:
            ended.set()
        return now
