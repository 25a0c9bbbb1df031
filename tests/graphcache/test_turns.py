"""Tests of turns.py: the capture thread's turns."""

from __future__ import annotations

import math
import threading

import pytest

from graphcache import FakeClock, NoTurns
from graphcache.governor import Governor
from graphcache.pulse import IDLE_TURN_SECONDS, TURN_SHARE, Pulse
from graphcache.turns import CaptureTurns


def make_turns() -> tuple[CaptureTurns, Governor, Pulse, FakeClock]:
    clock = FakeClock()
    governor, pulse = Governor(clock, 0.1), Pulse(clock)
    return CaptureTurns(governor, pulse, clock), governor, pulse, clock


def test_a_wait_stands_still_while_captures_are_paused() -> None:
    """It returns once they are resumed, at once while nobody is served."""
    turns, governor, _, _ = make_turns()
    turns.wait()
    governor.pause()
    waits = threading.Thread(target=turns.wait)
    waits.start()
    waits.join(0.02)
    assert waits.is_alive()
    governor.resume()
    waits.join(10.0)
    assert not waits.is_alive()


def test_a_wait_for_a_step_is_told_to_the_governor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that a capture stands still for steps counts as waited."""
    turns, governor, pulse, clock = make_turns()
    monkeypatch.setattr(pulse, "take_turn", lambda: clock.advance(3.0))
    turns.wait()
    assert governor.waited_seconds == pytest.approx(3.0)


def test_what_is_left_of_device_and_host() -> None:
    """A share of a step of the device; the host's quiet time, and none of it while captures are paused."""
    turns, governor, pulse, clock = make_turns()
    assert turns.device_seconds() == IDLE_TURN_SECONDS
    assert turns.host_seconds() == math.inf
    governor.pause()
    assert turns.host_seconds() == 0.0
    governor.resume()
    pulse.launching()
    pulse.launched()
    clock.advance(1.0)
    pulse.launching()
    pulse.launched()
    pulse.finished()
    assert turns.device_seconds() == pytest.approx(TURN_SHARE)
    assert turns.host_seconds() == pulse.quiet_seconds()


def test_without_others_nothing_is_waited_for() -> None:
    """For a backend that has the device to itself every part is one by itself, and the host is its own."""
    turns = NoTurns()
    turns.wait()
    assert turns.device_seconds() == 0.0
    assert turns.host_seconds() == math.inf
