"""Tests of profile.py."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Profile, ProfileEntry

ENTRY = {"key": "7", "num_hits": 3, "num_misses": 1, "saved_seconds": 0.5, "size_bytes": 10}
GOOD: dict[str, Any] = {"format": 1, "entries": [ENTRY]}

entries = st.builds(
    ProfileEntry,
    key=st.integers(),
    num_hits=st.integers(0, 10**12),
    num_misses=st.integers(0, 10**12),
    saved_seconds=st.floats(allow_nan=False, allow_infinity=False),
    size_bytes=st.integers(0, 10**15),
)


@given(st.lists(entries).map(lambda given: Profile(tuple(given))))
def test_json_round_trip(profile: Profile[int]) -> None:
    """A profile read back from its JSON, keys through str() and a parser, is the same profile."""
    assert Profile.from_json(profile.to_json(), int) == profile


@pytest.mark.parametrize("field", ["num_hits", "num_misses", "size_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_counts_are_checked(field: str, value: object) -> None:
    """A count that is no whole number from zero is refused, by name."""
    data = copy.deepcopy(GOOD)
    data["entries"][0][field] = value
    with pytest.raises(ValueError, match=field):
        Profile.from_dict(data, int)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, None])
def test_saved_seconds_are_checked(value: object) -> None:
    """Saved seconds that are no finite number are refused."""
    data = copy.deepcopy(GOOD)
    data["entries"][0]["saved_seconds"] = value
    with pytest.raises(ValueError, match="saved_seconds"):
        Profile.from_dict(data, int)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"format": 2, "entries": []},
        {"format": 1},
        {"format": 1, "entries": {}},
        {"format": 1, "entries": [1]},
        {"format": 1, "entries": [ENTRY | {"key": 7}]},
        {"format": 1, "entries": [ENTRY | {"key": "seven"}]},
    ],
)
def test_other_shapes_are_refused(data: object) -> None:
    """What is not a profile of this format, or has keys that do not parse, is a ValueError."""
    with pytest.raises(ValueError):  # noqa: PT011 each case has its own words
        Profile.from_dict(data, int)
    with pytest.raises(ValueError):  # noqa: PT011 each case has its own words
        Profile.from_json(json.dumps(data), int)


def test_no_json_is_refused() -> None:
    """Text that is no JSON is a ValueError, too."""
    with pytest.raises(ValueError, match="Expecting"):
        Profile.from_json("{", int)
