"""Numbers to their summary: mean, percentiles, extremes. It knows no requests and no units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Summary:
    """What a set of values looks like. Percentiles interpolate linearly between the two nearest values."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    minimum: float
    maximum: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def summarize(values: Sequence[float]) -> Summary | None:
    """The summary of `values`, in their unit; None when there are none. Raises ValueError on NaN or infinity."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a summary is of finite numbers only")
    p50, p95, p99 = (float(value) for value in np.percentile(array, (50, 95, 99)))
    return Summary(array.size, float(array.mean()), p50, p95, p99, float(array.min()), float(array.max()))
