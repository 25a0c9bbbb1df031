"""Histograms: which bucket a value falls into, and what a scrape is told."""

from __future__ import annotations

import math

import pytest

from hotgraph_server.observability.catalogue import METRICS
from hotgraph_server.observability.distribution import Distribution


def test_a_bound_belongs_to_its_bucket() -> None:
    """A value at a bound is at most that bound, one above it is not, and sums and counts are those of all values."""
    values = Distribution((1.0, 2.0))
    values.add(1.0)
    values.add(math.nextafter(1.0, 2.0), times=3)
    values.add(9.0)
    assert values.buckets() == [("1.0", 1.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert values.count == 5
    assert values.total == pytest.approx(13.0)


@pytest.mark.parametrize("bounds", [(), (2.0, 1.0), (1.0, 1.0)])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    """Bounds that a search would get lost in are refused."""
    with pytest.raises(ValueError, match="ascend"):
        Distribution(bounds)


def test_the_catalogue_is_sound() -> None:
    """Every metric has a meaning and a name in base units; histograms, and they alone, have bounds that make a Distribution."""
    for metric in METRICS.values():
        assert metric.meaning
        assert metric.name.startswith("hotgraph_")
        assert not metric.name.endswith(("_total", "_info", "_ms", "_milliseconds"))
        assert bool(metric.bounds) == (metric.kind == "histogram")
        if metric.bounds:
            Distribution(metric.bounds)
