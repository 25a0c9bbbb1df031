"""What those who are served are doing: whether steps are under way, and when the host is quiet beside them. The serving side
tells it, lock-free."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from graphcache.clock import Clock

IDLE_SECONDS = 0.25  # without a recorded step: nobody is being served, where only records tell
BREAK_SECONDS = 0.02  # between the end of a step and the next launch, where launches are told too: serving goes on
TURN_SHARE = 0.05  # of a step, that what runs before the next may take of the device
IDLE_TURN_SECONDS = 1e-3  # of the device, at once, while nobody is served: whoever comes then waits for no more
HANDOUT_SHARE = 0.15  # of a step, after a launch, in which results of the step before are still being handed out
MAX_HANDOUT_SECONDS = 2e-3
AHEAD_SHARE = 0.15  # of a step, before its end, from which on the interpreter is left to those who wait for it
MISS_TURN_SHARE = 0.25  # TURN_SHARE, of a step that misses its graph: it is the host that holds such a step up
MISS_HOST_SHARE = 0.5  # of such a step, from its begin, in which the interpreter is shared with whoever launches it
UNTOLD_HOST_SECONDS = 5e-4  # as long as the switch interval that is advised, so that nobody waits for much longer


class Pulse:
    """Steps as they are launched, finished and recorded.

    Around the end of a step the serving threads want the interpreter: one reads results, one plans, one launches. From soon
    after that launch until shortly before the next end they sleep, and the host is quiet.

    A step that misses its graph is launched kernel by kernel, for as long as it takes or nearly so, and the host is never
    quiet. If captures gave way to that, all steps would go on to miss. So they share such a step with whoever launches it.

    `launching` and `launched` are for one thread, `finished` is for one, maybe another. Who never calls them is taken to serve
    for a while after each `recorded`, which is less exact.
    """

    def __init__(self, clock: Clock) -> None:
        self._monotonic = clock.monotonic
        self._is_told = False  # of launches
        self._launches: deque[float] = deque()  # times of those that are not over; its append and popleft are atomic
        self._launch_monotonic = -math.inf  # of the newest
        self._miss_monotonic = -math.inf  # of the newest launch that was begun and misses its graph
        self._is_miss = False  # the newest step
        self._last_monotonic: float | None = None  # of the newest end or record
        self._step_seconds = 0.0  # of the newest step, without the time it waited for the one before
        self._told: threading.Event | None = None  # of whoever waits: something happened
        self._turn_monotonic = 0.0  # when the capture thread last waited

    @property
    def is_serving(self) -> bool:
        """Whether a step is under way, or was just now."""
        return self._serving_seconds() > 0

    def launching(self) -> None:
        """A step begins."""
        self._is_told = True
        self._is_miss = False
        self._launches.append(self._monotonic())

    def missing(self) -> None:
        """The step that is being launched misses its graph."""
        self._is_miss = True
        self._miss_monotonic = self._monotonic()
        self._tell()

    def launched(self) -> None:
        """Whoever launches has done so, and sleeps soon."""
        self._launch_monotonic = self._monotonic()
        self._tell()

    def finished(self) -> None:
        """The oldest step that was launched is over, or was given up."""
        last = self._last_monotonic
        begin = self._launches[0]
        self._end(begin if last is None else max(begin, last))
        self._launches.popleft()
        self._tell()

    def recorded(self, seconds: float | None) -> float:
        """A step was counted as a hit or a miss; returns the time. `seconds`: what it took, if that is known."""
        now = self._monotonic()
        if self._is_told:
            return now
        self._end(None if seconds is None else now - seconds)
        self._tell()
        return now

    def take_turn(self) -> None:
        """For the capture thread, between parts of its work: returns when it may go on.

        That is at once while nobody is served; else soon after another step is launched, or when one begins that misses its
        graph; or, where only records tell, when one is recorded.
        """
        since = self._monotonic()
        if not self._serving_seconds():
            return
        told = threading.Event()
        self._told = told
        limit = since + IDLE_SECONDS  # whatever a step does, and whether or not its end is told
        while not self._was_step_since(since):
            seconds = min(self._serving_seconds(), limit - self._monotonic())
            if seconds <= 0 or not told.wait(seconds):
                break
            told.clear()
        self._told = None
        if self._launch_monotonic > since:
            time.sleep(min(HANDOUT_SHARE * self._step_seconds, MAX_HANDOUT_SECONDS))
        self._turn_monotonic = self._monotonic()

    def turn_seconds(self) -> float:
        """How much of the device's time what runs beside those who are served may take before it waits."""
        if not self.is_serving:
            return IDLE_TURN_SECONDS
        return (MISS_TURN_SHARE if self._is_miss else TURN_SHARE) * self._step_seconds

    def quiet_seconds(self) -> float:
        """How long the host stays quiet: infinite while nobody is served; 0 or less when the interpreter is wanted."""
        if not self.is_serving:
            return math.inf
        now = self._monotonic()
        if not self._is_told:
            return self._turn_monotonic + UNTOLD_HOST_SECONDS - now
        launched, last = self._launch_monotonic, self._last_monotonic
        if self._miss_monotonic > launched:
            return self._miss_monotonic + MISS_HOST_SHARE * self._step_seconds - now
        if last is not None and last >= launched:
            return 0.0  # what follows is not launched yet
        # The step under way began with the end of the one before, if it was launched ahead of that.
        began = last if last is not None and len(self._launches) > 1 else launched
        return began + (1 - AHEAD_SHARE) * self._step_seconds - now

    def _was_step_since(self, moment: float) -> bool:
        if self._is_told:
            return self._launch_monotonic > moment or self._miss_monotonic > moment
        return self._last_monotonic is not None and self._last_monotonic > moment

    def _serving_seconds(self) -> float:
        """How long it will be taken that somebody is served, unless there is another step; 0 for nobody."""
        if self._launches:
            return IDLE_SECONDS
        last = self._last_monotonic
        if last is None:
            return 0.0
        return max(0.0, last + (BREAK_SECONDS if self._is_told else IDLE_SECONDS) - self._monotonic())

    def _end(self, begin: float | None) -> None:
        self._last_monotonic = now = self._monotonic()
        if begin is not None:
            self._step_seconds = now - begin

    def _tell(self) -> None:
        told = self._told
        if told is not None:
            told.set()
