"""Tests of bench/summary.py."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.bench.summary import summarize

NUMBERS = st.lists(st.floats(-1e9, 1e9, allow_nan=False), min_size=1, max_size=200)


@given(NUMBERS)
def test_a_summary_is_what_numpy_says(values: list[float]) -> None:
    """Each figure equals numpy's for the same values, percentiles by linear interpolation."""
    summary = summarize(values)
    assert summary is not None
    assert summary.count == len(values)
    assert math.isclose(summary.mean, float(np.mean(values)), rel_tol=1e-12, abs_tol=1e-12)
    assert [summary.p50, summary.p95, summary.p99] == [float(np.percentile(values, q)) for q in (50, 95, 99)]
    assert (summary.minimum, summary.maximum) == (min(values), max(values))


@given(NUMBERS)
def test_percentiles_are_in_order(values: list[float]) -> None:
    """min <= p50 <= p95 <= p99 <= max, whatever the values."""
    summary = summarize(values)
    assert summary is not None
    assert summary.minimum <= summary.p50 <= summary.p95 <= summary.p99 <= summary.maximum


def test_known_values() -> None:
    """The hundred numbers from 1 to 100 have the percentiles that a reader can check by hand."""
    summary = summarize([float(value) for value in range(1, 101)])
    assert summary is not None
    assert summary.mean == 50.5
    assert summary.p50 == 50.5
    assert summary.p95 == pytest.approx(95.05)
    assert summary.p99 == pytest.approx(99.01)


def test_nothing_measured_is_not_zero() -> None:
    """No values give no summary, so that nobody reads a 0 that was never measured."""
    assert summarize([]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    """A NaN or infinity is our mistake, and does not vanish in a mean."""
    with pytest.raises(ValueError, match="finite"):
        summarize([1.0, bad])
