"""Tests of governor.py."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import FakeClock
from graphcache.governor import BURST_SECONDS, MISS_SHARE, Governor


def test_a_debt_is_paid_off_before_the_next_capture() -> None:
    """A capture may overdraw the bucket; the next waits until the budget has filled what is missing."""
    clock = FakeClock()
    governor = Governor(clock, 0.1)
    assert governor.delay_seconds(is_serving=True) == 0.0
    governor.charge(0.1 * BURST_SECONDS + 0.05, is_serving=True)
    assert governor.delay_seconds(is_serving=True) == pytest.approx(0.5)
    clock.advance(0.5)
    assert governor.delay_seconds(is_serving=True) == 0.0


def test_captures_are_free_while_nothing_is_served() -> None:
    """Idle captures neither wait nor take from the bucket."""
    governor = Governor(FakeClock(), 0.1)
    governor.charge(100.0, is_serving=False)
    assert governor.delay_seconds(is_serving=True) == 0.0
    governor.charge(100.0, is_serving=True)
    assert governor.delay_seconds(is_serving=False) == 0.0


def test_no_budget_captures_only_when_idle() -> None:
    """A budget of zero never lets a capture start while something is served."""
    governor = Governor(FakeClock(), 0.0)
    assert governor.delay_seconds(is_serving=True) == math.inf
    assert governor.delay_seconds(is_serving=False) == 0.0
    assert governor.estimate_seconds(1.0, is_serving=True) == math.inf


def test_a_smaller_budget_takes_effect_at_once() -> None:
    """After a change the bucket holds no more than the new budget fills."""
    governor = Governor(FakeClock(), 1.0)
    governor.stall_budget_seconds = 0.01
    governor.charge(0.01 * BURST_SECONDS, is_serving=True)
    assert governor.delay_seconds(is_serving=True) == 0.0
    governor.charge(0.01, is_serving=True)
    assert governor.delay_seconds(is_serving=True) == pytest.approx(1.0)


def test_pause_holds_everything() -> None:
    """While paused no capture starts, idle or not, and a checkpoint waits until it is resumed."""
    governor = Governor(FakeClock(), 0.1)
    governor.pause()
    assert governor.is_paused
    assert governor.delay_seconds(is_serving=False) == math.inf
    assert governor.estimate_seconds(1.0, is_serving=False) == math.inf
    passed = threading.Event()

    def reach_checkpoint() -> None:
        governor.wait_while_paused()
        passed.set()

    thread = threading.Thread(target=reach_checkpoint)
    thread.start()
    assert not passed.is_set()
    governor.resume()
    assert passed.wait(30)
    thread.join(30)
    assert governor.delay_seconds(is_serving=False) == 0.0


def test_estimate_counts_what_is_saved_up() -> None:
    """Work that the bucket covers takes its own time; more takes as long as the budget needs to pay for it."""
    governor = Governor(FakeClock(), 0.1)
    assert governor.estimate_seconds(0.1, is_serving=True) == pytest.approx(0.1)
    assert governor.estimate_seconds(0.1 * BURST_SECONDS + 1.0, is_serving=True) == pytest.approx(10.0)
    assert governor.estimate_seconds(7.0, is_serving=False) == 7.0


@given(
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.0, 1.0)), min_size=1, max_size=30),
)
def test_interference_keeps_to_the_budget(rate: float, captures: list[tuple[float, float]]) -> None:
    """Over any stretch of serving, captures take no more than the budget, one burst and one capture."""
    clock = FakeClock()
    governor = Governor(clock, rate)
    spent_seconds = 0.0
    longest_seconds = max(seconds for seconds, _ in captures)
    for seconds, pause in captures:
        clock.advance(pause)
        if governor.delay_seconds(is_serving=True) == 0.0:
            clock.advance(seconds)
            governor.charge(seconds, is_serving=True)
            spent_seconds += seconds
        assert spent_seconds <= rate * (clock.monotonic() + BURST_SECONDS) + longest_seconds + 1e-6


def test_waiting_out_the_delay_is_enough() -> None:
    """After exactly the delay it names, the governor lets a capture start."""
    clock = FakeClock()
    governor = Governor(clock, 0.03)
    for _ in range(50):
        governor.charge(0.0101, is_serving=True)
        delay_seconds = governor.delay_seconds(is_serving=True)
        clock.advance(delay_seconds)
        assert governor.delay_seconds(is_serving=True) == 0.0


def test_repr() -> None:
    """repr tells what is left and whether it is paused."""
    governor = Governor(FakeClock(), 0.1)
    governor.pause()
    assert repr(governor) == "Governor(0.2000 s left, 0.1 s/s, paused)"


class PausedFor:
    """Stands in for the governor's event: not set when asked, and set once so many seconds have passed."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds

    def is_set(self) -> bool:
        return self.seconds == 0

    def wait(self) -> bool:
        self.clock.advance(self.seconds)
        return True


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_time_that_a_pause_takes_is_known(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A checkpoint tells how long it waited for the end of pauses, all of them together."""
    clock = FakeClock()
    governor = Governor(clock, 0.1)
    monkeypatch.setattr(governor, "_running", PausedFor(clock, seconds))
    governor.wait_while_paused()
    governor.wait_while_paused()
    assert governor.waited_seconds == 2 * seconds


def test_a_released_governor_holds_nobody() -> None:
    """After `release` whoever waits goes on, and a pause that comes later has no effect."""
    governor = Governor(FakeClock(), 0.1)
    governor.pause()
    waiting = threading.Thread(target=governor.wait_while_paused, daemon=True)
    waiting.start()
    governor.release()
    waiting.join(10)
    assert not waiting.is_alive()
    governor.pause()
    assert not governor.is_paused
    governor.wait_while_paused()


def test_misses_pay_for_captures() -> None:
    """What a miss took shortens a debt by its share, and fills the bucket to its brim and no further."""
    governor = Governor(FakeClock(), 0.1)
    governor.charge(0.1 * BURST_SECONDS + 0.05, is_serving=True)
    governor.credit_miss(0.04 / MISS_SHARE)
    assert governor.delay_seconds(is_serving=True) == pytest.approx(0.1)
    governor.credit_miss(100.0)
    governor.charge(0.1 * BURST_SECONDS, is_serving=True)
    assert governor.delay_seconds(is_serving=True) == 0.0
    governor.charge(0.01, is_serving=True)
    assert governor.delay_seconds(is_serving=True) == pytest.approx(0.1)


def test_without_a_budget_misses_pay_for_nothing() -> None:
    """A budget of zero captures while nothing is served, however many misses there are."""
    governor = Governor(FakeClock(), 0.0)
    governor.credit_miss(100.0)
    assert governor.delay_seconds(is_serving=True) == math.inf
