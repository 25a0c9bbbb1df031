"""When the requests of an open loop arrive: a schedule that no server can slow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

KINDS = ("poisson", "constant")


def arrival_times(rate_per_second: float, *, kind: str = "poisson", seed: int = 0) -> Iterator[float]:
    """Seconds since the start, without end, growing. Raises ValueError.

    `poisson`: independent exponential gaps of mean 1 / rate, as many independent callers make them. `constant`: equal
    gaps. The first arrival comes after the first gap.
    """
    if not (rate_per_second > 0 and np.isfinite(rate_per_second)):
        raise ValueError(f"a rate is above 0: {rate_per_second}")
    if kind not in KINDS:
        raise ValueError(f"arrivals are one of {', '.join(KINDS)}, not {kind!r}")
    return _arrivals(1.0 / rate_per_second, kind == "poisson", np.random.default_rng(seed))


def _arrivals(mean_gap_seconds: float, is_poisson: bool, random: np.random.Generator) -> Iterator[float]:
    count = 0
    time = 0.0
    while True:
        count += 1
        # A product, not a sum, keeps equal gaps free of drift.
        time = time + float(random.exponential(mean_gap_seconds)) if is_poisson else count * mean_gap_seconds
        yield time
