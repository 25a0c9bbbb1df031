"""Tests of pulse.py: who is being served, and waiting for a step's end."""

from __future__ import annotations

import math
import threading
import time

import pytest

from graphcache import FakeClock, SystemClock
from graphcache import pulse as pulse_module
from graphcache.pulse import (
    AHEAD_SHARE,
    BREAK_SECONDS,
    HANDOUT_SHARE,
    IDLE_SECONDS,
    IDLE_TURN_SECONDS,
    MAX_HANDOUT_SECONDS,
    MISS_HOST_SHARE,
    MISS_TURN_SHARE,
    TURN_SHARE,
    UNTOLD_HOST_SECONDS,
    Pulse,
)


def launch(pulse: Pulse) -> None:
    """A step is put on the device at once."""
    pulse.launching()
    pulse.launched()


def test_a_step_under_way_is_served_for_as_long_as_it_takes() -> None:
    """From launch to end, and for the short break in which the next one is launched."""
    clock = FakeClock()
    pulse = Pulse(clock)
    assert not pulse.is_serving
    launch(pulse)
    clock.advance(100.0)
    assert pulse.is_serving
    launch(pulse)
    pulse.finished()
    clock.advance(100.0)
    assert pulse.is_serving  # the second
    pulse.finished()
    clock.advance(BREAK_SECONDS * 0.9)
    assert pulse.is_serving
    clock.advance(BREAK_SECONDS * 0.2)
    assert not pulse.is_serving


def test_records_alone_count_for_a_while() -> None:
    """Who tells of records only is taken to serve until there was none for a quarter of a second."""
    clock = FakeClock()
    pulse = Pulse(clock)
    assert pulse.recorded(0.1) == clock.monotonic()
    clock.advance(IDLE_SECONDS * 0.9)
    assert pulse.is_serving
    clock.advance(IDLE_SECONDS * 0.2)
    assert not pulse.is_serving


def test_records_say_nothing_beside_launches() -> None:
    """A record comes at the end of a step that was told of already, and does not make it longer."""
    clock = FakeClock()
    pulse = Pulse(clock)
    launch(pulse)
    pulse.finished()
    clock.advance(BREAK_SECONDS * 2)
    assert pulse.recorded(0.1) == clock.monotonic()
    assert not pulse.is_serving


def test_nobody_waits_while_nobody_is_served() -> None:
    """Without a step under way the wait is over at once."""
    pulse = Pulse(FakeClock())
    pulse.take_turn()


def test_a_wait_ends_with_the_next_launch() -> None:
    """Beside steps the wait goes on until another is launched, not with the end of one, nor with a record of one."""
    pulse = Pulse(SystemClock())
    launch(pulse)
    launch(pulse)
    waits = threading.Thread(target=pulse.take_turn)
    waits.start()
    waits.join(0.02)
    assert waits.is_alive()
    pulse.finished()
    pulse.recorded(0.1)
    waits.join(0.02)
    assert waits.is_alive()
    launch(pulse)
    waits.join(IDLE_SECONDS / 2)
    assert not waits.is_alive()


def test_a_wait_ends_with_a_record_where_only_records_tell() -> None:
    """Who never tells of launches has the wait go on until the next record."""
    pulse = Pulse(SystemClock())
    pulse.recorded(0.1)
    waits = threading.Thread(target=pulse.take_turn)
    waits.start()
    waits.join(0.02)
    assert waits.is_alive()
    pulse.recorded(0.1)
    waits.join(IDLE_SECONDS / 2)
    assert not waits.is_alive()


def test_results_are_handed_out_before_a_turn_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the launch a turn waits for a share of a step, up to a limit; not where nothing was launched."""
    slept: list[float] = []
    monkeypatch.setattr("graphcache.pulse.time.sleep", slept.append)
    for step_seconds in (4e-3, 1.0):
        clock = FakeClock()
        pulse = Pulse(clock)
        launch(pulse)
        clock.advance(step_seconds)
        launch(pulse)
        pulse.finished()
        clock.advance(step_seconds / 2)
        waits = threading.Thread(target=pulse.take_turn)
        waits.start()
        while pulse._told is None:
            waits.join(0.001)
        clock.advance(1e-6)
        launch(pulse)
        waits.join(IDLE_SECONDS)
        assert not waits.is_alive()
        assert slept.pop() == pytest.approx(min(HANDOUT_SHARE * step_seconds, MAX_HANDOUT_SECONDS))
        pulse.finished()
        pulse.finished()
        clock.advance(BREAK_SECONDS * 0.9)
        pulse.take_turn()  # a break in which nothing is launched
        assert not slept


def test_a_wait_in_a_break_is_as_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step ends while it is waited for, and none follows, the wait is over with the break that serving may
    take."""
    monkeypatch.setattr(pulse_module, "IDLE_SECONDS", 60.0)
    for is_under_way in (False, True):
        pulse = Pulse(SystemClock())
        launch(pulse)
        if is_under_way:
            threading.Timer(0.01, pulse.finished).start()
        else:
            pulse.finished()
        begin = time.monotonic()
        pulse.take_turn()
        assert time.monotonic() - begin < 10.0
        assert not pulse.is_serving


def test_a_long_step_is_not_waited_for_for_ever() -> None:
    """A step that takes very long, or was never told to have ended, delays a capture and no more."""
    pulse = Pulse(SystemClock())
    launch(pulse)
    begin = time.monotonic()
    pulse.take_turn()
    assert IDLE_SECONDS * 0.9 < time.monotonic() - begin < IDLE_SECONDS * 20


def test_a_step_that_waited_for_another_is_no_longer_for_it() -> None:
    """With steps launched ahead, a step's time begins with the end of the one before."""
    clock = FakeClock()
    pulse = Pulse(clock)
    for _ in range(3):
        launch(pulse)
    clock.advance(100.0)
    pulse.finished()
    clock.advance(1.0)
    pulse.finished()
    assert pulse.turn_seconds() == pytest.approx(TURN_SHARE)


def test_a_step_that_is_being_launched_ends_no_wait() -> None:
    """A wait goes on until the whole step is on the device: until then the one who launches wants the interpreter."""
    pulse = Pulse(SystemClock())
    launch(pulse)
    waits = threading.Thread(target=pulse.take_turn)
    waits.start()
    while pulse._told is None:
        waits.join(0.001)
    pulse.launching()
    waits.join(0.02)
    assert waits.is_alive()
    pulse.launched()
    waits.join(IDLE_SECONDS / 2)
    assert not waits.is_alive()


def test_a_turn_is_a_share_of_a_step() -> None:
    """Beside steps a part may take a small share of the newest one; while nobody is served, a fixed short time."""
    clock = FakeClock()
    pulse = Pulse(clock)
    assert pulse.turn_seconds() == IDLE_TURN_SECONDS
    launch(pulse)
    launch(pulse)
    clock.advance(0.5)
    pulse.finished()
    assert pulse.turn_seconds() == TURN_SHARE * 0.5
    pulse.finished()
    clock.advance(BREAK_SECONDS * 2)
    assert pulse.turn_seconds() == IDLE_TURN_SECONDS


def test_a_record_without_a_time_says_nothing_of_steps() -> None:
    """It tells that somebody is served, and leaves what is known of the length of a step."""
    clock = FakeClock()
    pulse = Pulse(clock)
    pulse.recorded(0.5)
    pulse.recorded(None)
    assert pulse.is_serving
    assert pulse.turn_seconds() == pytest.approx(TURN_SHARE * 0.5)


def test_the_host_is_quiet_from_a_launch_to_shortly_before_the_next_end() -> None:
    """With steps launched ahead, each begins when the one before ends; between an end and the next launch there is no quiet."""
    clock = FakeClock()
    pulse = Pulse(clock)
    assert pulse.quiet_seconds() == math.inf
    launch(pulse)
    clock.advance(0.1)
    launch(pulse)
    clock.advance(0.9)
    pulse.finished()  # a step of a second
    assert pulse.quiet_seconds() == 0.0
    clock.advance(0.1)
    launch(pulse)
    clock.advance(0.1)
    assert pulse.quiet_seconds() == pytest.approx(1 - AHEAD_SHARE - 0.2)
    clock.advance(1.0)
    assert pulse.quiet_seconds() < 0
    pulse.finished()
    pulse.finished()
    assert pulse.quiet_seconds() == 0.0
    clock.advance(BREAK_SECONDS * 1.1)
    assert pulse.quiet_seconds() == math.inf


def test_a_lone_launch_is_quiet_from_itself_on() -> None:
    """Without a step under way before it, a step begins with its launch."""
    clock = FakeClock()
    pulse = Pulse(clock)
    launch(pulse)
    clock.advance(1.0)
    pulse.finished()
    clock.advance(100.0)
    launch(pulse)
    assert pulse.quiet_seconds() == pytest.approx(1 - AHEAD_SHARE)


def test_where_only_records_tell_quiet_is_short() -> None:
    """Nothing is known of ends then: the host may be taken for a fixed short time after each turn."""
    clock = FakeClock()
    pulse = Pulse(clock)
    pulse.recorded(0.1)
    pulse._turn_monotonic = clock.monotonic()
    assert pulse.quiet_seconds() == pytest.approx(UNTOLD_HOST_SECONDS)
    clock.advance(UNTOLD_HOST_SECONDS * 2)
    assert pulse.quiet_seconds() < 0


def test_a_wait_ends_when_a_step_begins_that_misses() -> None:
    """The capture thread need not wait until such a step is launched, which takes as long as the step."""
    pulse = Pulse(SystemClock())
    launch(pulse)
    waits = threading.Thread(target=pulse.take_turn)
    waits.start()
    pulse.launching()
    waits.join(0.02)
    assert waits.is_alive()
    pulse.missing()
    waits.join(IDLE_SECONDS / 2)
    assert not waits.is_alive()


def test_a_step_that_misses_is_shared() -> None:
    """From its begin the host is, for a part of it, and more of the device than of others; the next step is one of those."""
    clock = FakeClock()
    pulse = Pulse(clock)
    launch(pulse)
    clock.advance(1.0)
    pulse.finished()
    clock.advance(0.001)
    pulse.launching()
    assert pulse.quiet_seconds() == 0.0
    pulse.missing()
    clock.advance(0.1)
    assert pulse.quiet_seconds() == pytest.approx(MISS_HOST_SHARE - 0.1)
    assert pulse.turn_seconds() == pytest.approx(MISS_TURN_SHARE)
    clock.advance(MISS_HOST_SHARE)
    assert pulse.quiet_seconds() < 0
    pulse.launched()
    assert pulse.quiet_seconds() == pytest.approx(1 - AHEAD_SHARE)
    assert pulse.turn_seconds() == pytest.approx(MISS_TURN_SHARE)
    launch(pulse)
    assert pulse.turn_seconds() == pytest.approx(TURN_SHARE)
