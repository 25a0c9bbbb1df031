"""Tests of settings.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graphcache import CacheSettings


def test_defaults_are_valid() -> None:
    """A cache can be set up with no setting at all."""
    assert CacheSettings().policy == "value"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_bytes", -1),
        ("total_bytes", -1),
        ("policy", "fifo"),
        ("stall_budget_seconds", -0.1),
        ("stall_budget_seconds", 1.1),
        ("stall_budget_seconds", math.nan),
        ("max_graphs", 0),
        ("max_pending", 0),
        ("max_remembered", 0),
        ("max_events", 0),
        ("protected_fraction", 1.5),
        ("protected_fraction", math.nan),
        ("first_backoff_seconds", 0.0),
        ("max_backoff_seconds", math.inf),
        ("demand_half_life_seconds", math.nan),
        ("statistics_interval_seconds", -1.0),
    ],
)
def test_nonsense_is_refused_by_name(name: str, value: Any) -> None:
    """A setting out of its range is a ValueError that names it."""
    with pytest.raises(ValueError, match=name):
        CacheSettings(**{name: value})
