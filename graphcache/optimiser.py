"""Which bucket sizes suit the sizes that come: the ladder with the least padding for its bytes. It reads no clock.

A program starts with a fixed `Ladder`. Once it has seen what comes, it asks for a better one and takes that as its next
generation: keys of the new ladder are captured as they are missed, those of the old one are used no more and evicted.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from graphcache.ladder import Ladder

MAX_EXPONENT = 256.0  # of the growing weights, in half-lives, before they are scaled back; doubles hold four times that


class SizeHistogram:
    """How often each size came, each time counting half as much after every half-life.

    Instead of shrinking what is there, new counts weigh more (forward decay: Cormode et al., "Forward Decay", ICDE 2009),
    so counting costs the same however many sizes there are. Sizes are as many as the caller lets them be. For one thread.
    """

    def __init__(self, half_life_seconds: float) -> None:
        """Raises ValueError unless `half_life_seconds` is positive and finite."""
        if not (half_life_seconds > 0 and math.isfinite(half_life_seconds)):
            raise ValueError(f"half_life_seconds is positive and finite, not {half_life_seconds}")
        self._half_life_seconds = half_life_seconds
        self._weights: dict[int, float] = {}  # of each size, as seen from `_start`
        self._start: float | None = None  # when a count weighs 1; of the first, or of the last scaling

    def __repr__(self) -> str:
        return f"SizeHistogram({len(self._weights)} sizes, half-life {self._half_life_seconds:g} s)"

    def record(self, size: int, now: float) -> None:
        """One more of this size at `now`, seconds on any clock that does not go back. Raises ValueError below 1."""
        if size < 1:
            raise ValueError(f"sizes start at 1, not {size}")
        if self._start is None:
            self._start = now
        exponent = (now - self._start) / self._half_life_seconds
        if exponent > MAX_EXPONENT:
            self._weights = self.counts(now)
            self._start, exponent = now, 0.0
        self._weights[size] = self._weights.get(size, 0.0) + 2.0**exponent

    def counts(self, now: float) -> dict[int, float]:
        """Decayed counts by size as of `now`, those that still count for anything."""
        if self._start is None:
            return {}
        scale = 0.5 ** ((now - self._start) / self._half_life_seconds)
        return {size: weight * scale for size, weight in self._weights.items() if weight * scale > 0}


def choose_ladder(
    counts: Mapping[int, float],
    cost_seconds: Callable[[int], float],
    *,
    max_buckets: int,
    graph_bytes: Callable[[int], int] = lambda size: 0,
    byte_price_seconds: float = 0.0,
    candidates: Iterable[int] = (),
) -> Ladder:
    """The ladder of at most `max_buckets` sizes with the least `ladder_seconds`; of equals the one with fewer sizes.

    - counts: how often each size is expected in some period; not negative.
    - cost_seconds: what a step of a bucket's size takes. It may fall where a larger step is faster.
    - graph_bytes, byte_price_seconds: what a graph of that size holds, and what holding a byte for the period is worth.
    - candidates: sizes that buckets may have; the counted ones when there are none. Give more, up to the largest size that
      has to be served, when costs may fall with size or larger steps may come.

    Exact, by dynamic programming over the candidates in rising order: the best ladder of j buckets whose last is the i-th
    is the best of j - 1 buckets whose last is some earlier one, plus what falls in between (the partition of a histogram of
    Jagadish et al., "Optimal Histograms with Quality Guarantees", VLDB 1998, after Bellman, CACM 4(6), 1961). Takes time
    n² k and room n k for n candidates and k buckets: about a quarter of a second for 400 and 24. For a thread that may wait.

    Raises ValueError when there is nothing to choose from, or nothing that holds the largest counted size.
    """
    if max_buckets < 1:
        raise ValueError(f"a ladder needs at least one size, not {max_buckets}")
    sizes = sorted(size for size, count in counts.items() if count > 0)
    allowed = Ladder(candidates or sizes).sizes
    if sizes and allowed[-1] < sizes[-1]:
        raise ValueError(f"no candidate holds size {sizes[-1]}")
    # below[i]: counts of the sizes that fit under the i-th candidate, with below[0] of none.
    totals = [0.0, *accumulate(counts[size] for size in sizes)]
    below = [0.0, *(totals[bisect_left(sizes, size + 1)] for size in allowed)]
    seconds = [math.nan, *(cost_seconds(size) for size in allowed)]
    prices = [math.nan, *(byte_price_seconds * graph_bytes(size) for size in allowed)]
    first_last = bisect_left(allowed, sizes[-1]) + 1 if sizes else 1  # the smallest that may be the last bucket
    num_allowed = len(allowed)

    best: tuple[float, list[int]] | None = None
    previous = [0.0] + [math.inf] * num_allowed  # the least seconds with the i-th as last bucket, of one bucket less
    parents: list[list[int]] = []
    for num_buckets in range(1, min(max_buckets, num_allowed) + 1):
        current = [math.inf] * (num_allowed + 1)
        parent = [0] * (num_allowed + 1)
        for last in range(num_buckets, num_allowed + 1):
            cost, held = seconds[last], below[last]
            least, chosen = math.inf, 0
            for before in range(num_buckets - 1, last):
                total = previous[before] + (held - below[before]) * cost
                if total < least:
                    least, chosen = total, before
            current[last], parent[last] = least + prices[last], chosen
        parents.append(parent)
        last = min(range(max(first_last, num_buckets), num_allowed + 1), key=current.__getitem__)
        if best is None or current[last] < best[0]:
            best = current[last], _path(parents, last)
        previous = current
    assert best is not None  # there is a candidate, and one of them holds the largest size
    return Ladder(allowed[index - 1] for index in best[1])


def ladder_seconds(
    ladder: Ladder,
    counts: Mapping[int, float],
    cost_seconds: Callable[[int], float],
    *,
    graph_bytes: Callable[[int], int] = lambda size: 0,
    byte_price_seconds: float = 0.0,
) -> float:
    """What the counted steps take on this ladder, each padded to its bucket, plus the price of its graphs' bytes.

    Compare two ladders by it before swapping one for the other: captures have a price of their own. What padding costs is
    this minus the same for a ladder of all counted sizes. Raises ValueError when a counted size has no bucket.
    """
    total = 0.0
    for size, count in counts.items():
        if count > 0:
            bucket = ladder.bucket(size)
            if bucket is None:
                raise ValueError(f"no bucket holds size {size}")
            total += count * cost_seconds(bucket)
    return total + sum(byte_price_seconds * graph_bytes(size) for size in ladder)


def _path(parents: list[list[int]], last: int) -> list[int]:
    """The buckets that lead to `last`, from the choices noted at each number of buckets."""
    path = []
    for parent in reversed(parents):
        path.append(last)
        last = parent[last]
    return path
