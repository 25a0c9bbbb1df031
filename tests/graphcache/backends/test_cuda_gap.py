"""Tests of cuda_gap.py: parts go between steps, and nobody waits for what is not there yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphcache.backends.cuda_gap import StepGap
from tests.graphcache.backends.cuda_fakes import DEFAULT_STREAM, FakeRuntime

SERVING = DEFAULT_STREAM


class Rig:
    """An open gap, and a stream for parts."""

    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.stream = self.runtime.take_stream()
        self.gap = StepGap(self.runtime)
        self.gap.open(lambda: self.runtime.current)
        self.runtime.calls.clear()

    def step(self) -> None:
        self.gap.before_step()
        self.runtime.calls.append("step")
        self.gap.after_step()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_part_goes_between_two_steps(rig: Rig) -> None:
    """The part goes behind the step that is launched while a gap is waited for, and the step after that behind the part."""
    rig.step()
    rig.gap.enter(rig.stream, rig.step)
    rig.runtime.calls.append("part")
    rig.gap.leave(rig.stream)
    rig.step()
    rig.step()
    assert rig.runtime.calls == [
        "step",
        "step",
        f"record_event {SERVING}",
        f"wait_event of {SERVING} {rig.stream}",
        "part",
        f"record_event {rig.stream}",
        f"wait_event of {rig.stream} {SERVING}",
        "step",
        "step",
    ]


def test_steps_are_as_ever_while_no_part_is_there(rig: Rig) -> None:
    """Who serves marks nothing and waits for nothing unless a part is to go in between, or is over."""
    rig.step()
    rig.gap.enter(rig.stream, lambda: None)  # nothing was launched meanwhile: nobody is served
    rig.gap.leave(rig.stream)
    rig.step()
    rig.gap.enter(rig.stream, rig.step)
    rig.gap.leave(rig.stream)
    rig.gap.settle()
    rig.runtime.calls.clear()
    rig.step()
    assert rig.runtime.calls == ["step"]


def test_a_part_that_is_late_holds_nobody_up(rig: Rig) -> None:
    """A step that is launched before the whole part is on the device does not wait for it; the next one does."""
    rig.gap.enter(rig.stream, rig.step)
    rig.runtime.calls.clear()
    rig.step()
    assert rig.runtime.calls == ["step"]
    rig.gap.leave(rig.stream)
    rig.step()
    assert rig.runtime.calls[-2:] == [f"wait_event of {rig.stream} {SERVING}", "step"]


def test_a_mark_serves_one_part(rig: Rig) -> None:
    """A part does not go behind a step of long ago: without a new one it goes at once."""
    waits: list[Callable[[], None]] = [rig.step, lambda: None]
    for wait in waits:
        rig.runtime.calls.clear()
        rig.gap.enter(rig.stream, wait)
    assert rig.runtime.calls == []
    with pytest.raises(ZeroDivisionError):
        rig.gap.enter(rig.stream, lambda: print(1 // 0))
    rig.step()
    assert rig.runtime.calls == ["step"]


def test_after_its_close_steps_are_not_told_of(rig: Rig) -> None:
    """What is left of a part is forgotten, and the events are handed over once."""
    rig.gap.enter(rig.stream, rig.step)
    rig.gap.leave(rig.stream)
    events = rig.gap.close()
    assert sorted(events) == sorted(rig.runtime.events)
    assert rig.gap.close() == []
    rig.runtime.calls.clear()
    rig.step()
    assert rig.runtime.calls == ["step"]


def test_a_gap_that_is_not_open_lets_steps_pass() -> None:
    """Before the capture thread has come to open it, steps are as ever."""
    runtime = FakeRuntime()
    gap = StepGap(runtime)
    gap.before_step()
    gap.after_step()
    assert runtime.calls == []
