"""When a capture may start: the stall budget. It knows seconds of interference and nothing of graphs."""

from __future__ import annotations

import math
import threading

from graphcache.clock import Clock

MISS_SHARE = 0.5  # of what a step took that missed its graph: captures may take as much, and such steps end the sooner
BURST_SECONDS = 2.0  # of serving whose unused allowance is kept
TOLERANCE_SECONDS = 1e-9


class Governor:
    """A token bucket of interference: it fills by the stall budget for every second, and a capture takes what it took.

    A capture may start while there is anything in the bucket, so a long one runs and is paid off before the next. While
    nothing is served captures are free, and steps that miss their graphs pay for captures, too. A budget of 0 captures only
    while nothing is served. Called under the cache's lock, except for `wait_while_paused`.
    """

    def __init__(self, clock: Clock, stall_budget_seconds: float) -> None:
        self._clock = clock
        self._rate = stall_budget_seconds  # seconds of interference per second of serving
        self._tokens_seconds = self._capacity_seconds
        self._filled_monotonic = clock.monotonic()
        # That captures under way stood still, for a pause or for a step; written by the capture thread.
        self.waited_seconds = 0.0
        self.stall_seconds = 0.0  # that captures took while others were served: all that was ever charged
        self._running = threading.Event()
        self._running.set()
        self._is_open = True

    def __repr__(self) -> str:
        paused = ", paused" if self.is_paused else ""
        return f"Governor({self._tokens_seconds:.4f} s left, {self._rate:g} s/s{paused})"

    @property
    def stall_budget_seconds(self) -> float:
        """Interference allowed for each second of serving."""
        return self._rate

    @stall_budget_seconds.setter
    def stall_budget_seconds(self, seconds: float) -> None:
        self._fill()
        self._rate = seconds
        self._tokens_seconds = min(self._tokens_seconds, self._capacity_seconds)

    @property
    def is_paused(self) -> bool:
        return not self._running.is_set()

    def pause(self) -> None:
        """No capture starts, and one under way stops at its next turn, until `resume`. Nothing after `release`."""
        if self._is_open:
            self._running.clear()
            if not self._is_open:  # released in between
                self._running.set()

    def resume(self) -> None:
        self._running.set()

    def release(self) -> None:
        """Whoever waits goes on, for good: the cache is being closed."""
        self._is_open = False
        self._running.set()

    def wait_while_paused(self) -> None:
        """Returns once captures are not paused. For the capture thread, between the phases of a capture."""
        if not self._running.is_set():
            started = self._clock.monotonic()
            self._running.wait()
            self.waited_seconds += self._clock.monotonic() - started

    def delay_seconds(self, *, is_serving: bool) -> float:
        """How long until a capture may start; 0 for now, infinite while nothing but an event changes that."""
        if self.is_paused:
            return math.inf
        if not is_serving:
            return 0.0
        if self._rate <= 0:
            return math.inf
        self._fill()
        return 0.0 if self._tokens_seconds >= -TOLERANCE_SECONDS else -self._tokens_seconds / self._rate

    def charge(self, seconds: float, *, is_serving: bool) -> None:
        """A capture took `seconds`."""
        if is_serving:
            self._fill()
            self._tokens_seconds -= seconds
            self.stall_seconds += seconds

    def credit_miss(self, seconds: float) -> None:
        """A step of `seconds` missed a graph that is to be captured."""
        if self._rate > 0:
            self._fill()
            self._tokens_seconds = min(self._capacity_seconds, self._tokens_seconds + MISS_SHARE * seconds)

    def estimate_seconds(self, work_seconds: float, *, is_serving: bool) -> float:
        """How long `work_seconds` of captures take from now, as things stand; may be infinite."""
        if self.is_paused:
            return math.inf
        if not is_serving:
            return work_seconds
        if self._rate <= 0:
            return math.inf
        self._fill()
        return max(work_seconds, (work_seconds - self._tokens_seconds) / self._rate)

    @property
    def _capacity_seconds(self) -> float:
        return self._rate * BURST_SECONDS

    def _fill(self) -> None:
        now = self._clock.monotonic()
        gained_seconds = (now - self._filled_monotonic) * self._rate
        self._tokens_seconds = min(self._capacity_seconds, self._tokens_seconds + gained_seconds)
        self._filled_monotonic = now
