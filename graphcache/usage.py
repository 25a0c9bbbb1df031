"""What is recorded about the use of one key: counts, recent times, decayed demand. It does not decide anything."""

from __future__ import annotations

from statistics import median

WINDOW = 16  # samples that a median is taken over; a power of two, see Usage.record_hit


class Usage:
    """Counts and recent times of one key.

    Hits are written by the serving thread without a lock: a few attribute writes. With several serving threads a hit can
    be lost when two write at once, which only blurs the statistics. Misses are written under the cache's lock.
    """

    __slots__ = (
        "eager_samples",
        "graph_samples",
        "last_hit_monotonic",
        "last_miss_monotonic",
        "num_eager_samples",
        "num_hits",
        "num_misses",
    )

    def __init__(self) -> None:
        self.num_hits = 0
        self.num_misses = 0
        self.num_eager_samples = 0
        self.last_hit_monotonic: float | None = None
        self.last_miss_monotonic: float | None = None
        self.graph_samples = [0.0] * WINDOW
        self.eager_samples = [0.0] * WINDOW

    def record_hit(self, seconds: float, now: float) -> None:
        """Counts one replay that took `seconds`."""
        num_hits = self.num_hits
        self.graph_samples[num_hits & (WINDOW - 1)] = seconds
        self.last_hit_monotonic = now
        self.num_hits = num_hits + 1

    def record_miss(self, seconds: float | None, now: float) -> None:
        """Counts one run without the graph, which took `seconds` eagerly; None when it was not eager either."""
        if seconds is not None:
            self.eager_samples[self.num_eager_samples & (WINDOW - 1)] = seconds
            self.num_eager_samples += 1
        self.last_miss_monotonic = now
        self.num_misses += 1

    @property
    def num_uses(self) -> int:
        return self.num_hits + self.num_misses

    @property
    def last_use_monotonic(self) -> float | None:
        times = [time for time in (self.last_hit_monotonic, self.last_miss_monotonic) if time is not None]
        return max(times, default=None)

    @property
    def graph_seconds(self) -> float | None:
        """Median of the last replays; None before the first."""
        return median(self.graph_samples[: self.num_hits]) if self.num_hits else None

    @property
    def eager_seconds(self) -> float | None:
        """Median of the last eager runs; None before the first."""
        return median(self.eager_samples[: self.num_eager_samples]) if self.num_eager_samples else None


class Demand:
    """Uses, each counting half as much after every half-life: what is expected to come, in uses per half-life or so.

    Uses are seen in lumps, at `update`, and count as of then; the cache updates at least once a statistics interval.
    """

    __slots__ = ("_num_seen", "_updated_monotonic", "_weight")

    def __init__(self, now: float) -> None:
        self._weight = 0.0
        self._num_seen = 0
        self._updated_monotonic = now

    def add(self, weight: float) -> None:
        """Uses that another process saw: what a profile says."""
        self._weight += weight

    def update(self, num_uses: int, now: float, half_life_seconds: float) -> float:
        """Takes in the uses since the last update; returns the decayed count."""
        age_seconds = max(0.0, now - self._updated_monotonic)
        self._weight = self._weight * 0.5 ** (age_seconds / half_life_seconds) + (num_uses - self._num_seen)
        self._num_seen = num_uses
        self._updated_monotonic = now
        return self._weight
