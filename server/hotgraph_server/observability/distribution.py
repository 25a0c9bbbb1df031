"""Histograms that cost a search and two additions: counted on the event loop without a lock, read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Distribution:
    """Values by bucket, as OpenMetrics has it: a bucket holds what is at most its bound. Values are not negative."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend; what is above the last has a bucket of its own."""
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise ValueError("bounds ascend")
        self.bounds = tuple(float(bound) for bound in bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """The value came so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Bound as text, and how many values are at most that, for each bucket; the last is "+Inf"."""
        names = [*(repr(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, (float(count) for count in accumulate(self.counts)), strict=True))
