"""Tests of clock.py."""

from __future__ import annotations

import time

import pytest

from graphcache import FakeClock, SystemClock


def test_fake_clock_moves_only_when_advanced() -> None:
    """Both times of a fake clock stand still, and move together by what it is advanced."""
    clock = FakeClock(start_time=1000.0)
    assert (clock.monotonic(), clock.time()) == (0.0, 1000.0)
    clock.advance(2.5)
    assert (clock.monotonic(), clock.time()) == (2.5, 1002.5)


def test_fake_clock_does_not_go_back() -> None:
    """A negative advance is refused."""
    with pytest.raises(ValueError, match="back"):
        FakeClock().advance(-1.0)


def test_system_clock_is_the_systems() -> None:
    """The system clock reads the system's two clocks."""
    clock = SystemClock()
    before = time.monotonic()
    assert before <= clock.monotonic() <= time.monotonic()
    assert abs(clock.time() - time.time()) < 60
