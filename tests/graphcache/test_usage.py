"""Tests of usage.py."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.usage import WINDOW, Demand, Usage


def test_nothing_is_known_before_the_first_use() -> None:
    """Medians and times are None before there is anything to take them of."""
    usage = Usage()
    assert usage.graph_seconds is None
    assert usage.eager_seconds is None
    assert usage.last_use_monotonic is None
    assert usage.num_uses == 0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=3 * WINDOW))
def test_medians_are_of_the_last_window(samples: list[float]) -> None:
    """Medians are those of the last WINDOW samples, hits and misses apart, while counts are of all."""
    usage = Usage()
    for at, seconds in enumerate(samples):
        usage.record_hit(seconds, float(at))
        usage.record_miss(2 * seconds, float(at))
    assert usage.graph_seconds == median(samples[-WINDOW:])
    assert usage.eager_seconds == median([2 * seconds for seconds in samples[-WINDOW:]])
    assert usage.num_hits == usage.num_misses == len(samples)
    assert usage.last_use_monotonic == len(samples) - 1


def test_a_miss_that_was_not_eager_has_no_time() -> None:
    """A step that another graph served counts as a miss and leaves the eager median alone."""
    usage = Usage()
    usage.record_miss(2.0, 0.0)
    usage.record_miss(None, 1.0)
    assert usage.num_misses == 2
    assert usage.eager_seconds == 2.0
    assert usage.last_use_monotonic == 1.0


def test_demand_halves_with_every_half_life() -> None:
    """A use counts half after one half-life and a quarter after two."""
    demand = Demand(0.0)
    assert demand.update(8, 0.0, 10.0) == 8.0
    assert demand.update(8, 10.0, 10.0) == pytest.approx(4.0)
    assert demand.update(8, 20.0, 10.0) == pytest.approx(2.0)
    assert demand.update(9, 20.0, 10.0) == pytest.approx(3.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=20))
def test_looking_more_often_changes_nothing_for_old_uses(steps: list[tuple[int, float]]) -> None:
    """The decayed count of uses already seen does not depend on how often it is looked at."""
    often, rarely = Demand(0.0), Demand(0.0)
    often.update(10, 0.0, 7.0)
    rarely.update(10, 0.0, 7.0)
    now = 0.0
    for _, pause in steps:
        now += pause
        often.update(10, now, 7.0)
    assert often.update(10, now, 7.0) == pytest.approx(rarely.update(10, now, 7.0))


def test_demand_of_a_profile_counts() -> None:
    """What a profile adds decays like uses seen here."""
    demand = Demand(0.0)
    demand.add(4.0)
    assert demand.update(0, 10.0, 10.0) == pytest.approx(2.0)
