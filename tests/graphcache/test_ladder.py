"""Tests of ladder.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Ladder


@given(st.sets(st.integers(1, 1000), min_size=1), st.integers(1, 1100))
def test_bucket_is_the_smallest_that_holds(sizes: set[int], size: int) -> None:
    """bucket(n) is the least size not below n, or None where there is none."""
    assert Ladder(sizes).bucket(size) == min((other for other in sizes if other >= size), default=None)


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_powers(limit: int, sizes: list[int]) -> None:
    """Powers of two below the limit, and the limit."""
    assert list(Ladder.powers(limit)) == sizes


def test_stepped() -> None:
    """Each part rises by its step and ends at its end exactly."""
    assert list(Ladder.stepped(((4, 1), (10, 2), (15, 4)))) == [1, 2, 3, 4, 6, 8, 10, 14, 15]


@pytest.mark.parametrize("steps", [((4, 0),), ((4, 1), (4, 2)), ((4, 1), (3, 1))])
def test_stepped_must_rise(steps: tuple[tuple[int, int], ...]) -> None:
    """A part that does not rise is refused."""
    with pytest.raises(ValueError, match="rises"):
        Ladder.stepped(steps)


@pytest.mark.parametrize("sizes", [[], [0], [-1, 2]])
def test_sizes_start_at_one(sizes: list[int]) -> None:
    """A ladder without sizes, or with sizes below one, is refused."""
    with pytest.raises(ValueError, match="size"):
        Ladder(sizes)


def test_ladders_compare_by_their_sizes() -> None:
    """Order and repetition of the given sizes do not matter."""
    assert Ladder([4, 1, 4]) == Ladder([1, 4])
    assert hash(Ladder([4, 1])) == hash(Ladder([1, 4]))
    assert Ladder([1]) != Ladder([2])
    assert len(Ladder([3, 3])) == 1
    assert repr(Ladder([2, 1])) == "Ladder([1, 2])"
