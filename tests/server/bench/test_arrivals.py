"""Tests of bench/arrivals.py."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.bench.arrivals import arrival_times


@given(rate=st.floats(0.01, 1e4), seed=st.integers(0, 2**32))
def test_arrivals_grow_and_repeat(rate: float, seed: int) -> None:
    """Times grow from after 0, and the same seed gives the same times."""
    times = list(islice(arrival_times(rate, seed=seed), 50))
    assert times[0] > 0
    assert all(earlier < later for earlier, later in pairwise(times))
    assert times == list(islice(arrival_times(rate, seed=seed), 50))


def test_poisson_gaps_are_exponential() -> None:
    """20,000 gaps have the mean, the deviation and the quantiles of an exponential distribution, and do not depend on
    one another."""
    times = np.array(list(islice(arrival_times(50.0, seed=1), 20_000)))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, share) == pytest.approx(-0.02 * np.log(1 - share), rel=0.08)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_counts_in_a_window_are_poisson() -> None:
    """The number of arrivals in equal windows has a variance equal to its mean."""
    times = np.array(list(islice(arrival_times(10.0, seed=5), 20_000)))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(10.0, rel=0.05)
    assert counts.var() == pytest.approx(10.0, rel=0.1)


def test_constant_gaps_do_not_drift() -> None:
    """Arrival n is at n gaps, exactly."""
    times = list(islice(arrival_times(3.0, kind="constant"), 1000))
    assert times == [number * (1 / 3.0) for number in range(1, 1001)]


@pytest.mark.parametrize(("rate", "kind"), [(0.0, "poisson"), (-1.0, "poisson"), (float("inf"), "poisson"), (1.0, "x")])
def test_bad_arrivals_are_refused(rate: float, kind: str) -> None:
    """A rate of 0 or less, an infinite one and an unknown kind are errors at once, not at the first arrival."""
    with pytest.raises(ValueError, match=r"rate|arrivals"):
        arrival_times(rate, kind=kind)
