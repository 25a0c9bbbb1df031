"""Tests of capture.py."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from graphcache import CaptureError, DeviceLostError, EagerBackend, FakeBackend, FakeClock, FakeProgram, NoTurns, Turns
from graphcache.capture import Capturer, MismatchError, Verification
from tests.graphcache.turns import GivenTurns


def make_capturer(program: FakeProgram, backend: FakeBackend, clock: FakeClock) -> tuple[Capturer[str], list[str]]:
    waits: list[str] = []
    return Capturer(program, backend, clock, GivenTurns(lambda: waits.append("wait"))), waits


def test_phases_run_in_order_with_turns_between(program: FakeProgram, backend: FakeBackend, clock: FakeClock) -> None:
    """The backend is started once, and between binding, recording, instantiating and verifying a capture can pause."""
    capturer, waits = make_capturer(program, backend, clock)
    program.verify_seconds = 0.5
    captured = capturer.capture("a", "a")
    assert len(waits) == 2
    assert capturer.verify("a", "a", captured) == Verification(0.5, is_replayed=True)
    assert len(waits) == 3
    capturer.capture("b", "b")
    assert backend.num_starts == 1
    assert program.num_runs["a"] == 1  # by the verification only


def test_a_mismatch_destroys_the_capture(program: FakeProgram, backend: FakeBackend, clock: FakeClock) -> None:
    """A capture that gives other results is destroyed, and said to be such."""
    capturer, _ = make_capturer(program, backend, clock)
    program.mismatches.add("a")
    captured = capturer.capture("a", "a")
    with pytest.raises(MismatchError, match="eager"):
        capturer.verify("a", "a", captured)
    assert backend.live == []
    assert backend.num_destroys["a"] == 1


def test_capture_errors_pass_with_their_text(program: FakeProgram, backend: FakeBackend, clock: FakeClock) -> None:
    """A backend's or a program's own CaptureError is handed on as it is."""
    capturer, _ = make_capturer(program, backend, clock)
    backend.failures["a"] = "out of memory"
    with pytest.raises(CaptureError, match=r"^out of memory$"):
        capturer.capture("a", "a")
    program.failures["b"] = CaptureError("no kernel for it")
    with pytest.raises(CaptureError, match=r"^no kernel for it$"):
        capturer.capture("b", "b")


def test_a_lost_device_passes_from_any_phase(program: FakeProgram, backend: FakeBackend, clock: FakeClock) -> None:
    """That the device is lost is not made a failed capture, whoever finds out, and a capture under way is destroyed."""
    capturer, _ = make_capturer(program, backend, clock)
    lost = DeviceLostError("the device is lost")
    program.failures["a"] = lost
    with pytest.raises(DeviceLostError) as caught:
        capturer.capture("a", "a")
    assert caught.value is lost
    captured = capturer.capture("b", "b")
    program.verify = lambda key, replay: _raise(lost)  # type: ignore[method-assign]  # a program that finds out late
    with pytest.raises(DeviceLostError):
        capturer.verify("b", "b", captured)
    assert backend.live == []


def _raise(error: Exception) -> bool:
    raise error


def test_other_errors_become_a_fixed_text_and_a_log(
    program: FakeProgram, backend: FakeBackend, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other exception becomes a CaptureError without its details, which go to the log with the traceback."""
    capturer, _ = make_capturer(program, backend, clock)
    program.failures["a"] = KeyError("secret")
    with caplog.at_level(logging.ERROR, logger="graphcache"), pytest.raises(CaptureError) as failure:
        capturer.capture("a", "a")
    assert str(failure.value) == "unexpected KeyError; the log has it"
    assert "secret" in caplog.text


def test_an_error_while_verifying_destroys_the_capture(backend: FakeBackend, clock: FakeClock) -> None:
    """A verification that raises is a failure, no mismatch, and the capture is gone."""

    class BrokenProgram(FakeProgram):
        def verify(self, key: object, replay: Callable[[], None]) -> bool:
            raise CaptureError("no gap to verify in")

    capturer, _ = make_capturer(BrokenProgram(clock), backend, clock)
    captured = capturer.capture("a", "a")
    with pytest.raises(CaptureError, match="no gap") as failure:
        capturer.verify("a", "a", captured)
    assert not isinstance(failure.value, MismatchError)
    assert backend.live == []


def test_a_backend_that_did_not_start_is_tried_again(program: FakeProgram, clock: FakeClock) -> None:
    """A failed start fails the capture; the next capture starts the backend again."""

    class ShyBackend(FakeBackend):
        def start(self, turns: Turns) -> None:
            super().start(turns)
            if self.num_starts == 1:
                raise RuntimeError("no device yet")

    backend = ShyBackend(clock)
    capturer, _ = make_capturer(program, backend, clock)
    with pytest.raises(CaptureError, match="RuntimeError"):
        capturer.capture("a", "a")
    capturer.close()
    assert backend.num_closes == 0  # it never started
    capturer.capture("a", "a").destroy()
    capturer.close()
    capturer.close()
    assert (backend.num_starts, backend.num_closes) == (2, 1)


def test_nothing_is_verified_that_cannot_differ(program: FakeProgram, clock: FakeClock) -> None:
    """A backend whose replay is the eager run needs no verification, and none runs."""
    capturer: Capturer[str] = Capturer(program, EagerBackend(), clock, NoTurns())
    captured = capturer.capture("a", "a")
    assert capturer.verify("a", "a", captured) is None
    assert program.num_runs["a"] == 0


def test_a_failing_destroy_or_close_is_logged(
    program: FakeProgram, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nobody to raise to when freeing fails, so it is logged and life goes on."""

    class BrokenBackend(FakeBackend):
        def close(self) -> None:
            raise RuntimeError("will not close")

    backend = BrokenBackend(clock)
    capturer, _ = make_capturer(program, backend, clock)
    captured = capturer.capture("a", "a")
    capturer.destroy("a", captured)
    with caplog.at_level(logging.ERROR, logger="graphcache"):
        capturer.destroy("a", captured)
        capturer.close()
    assert "destroyed twice" in caplog.text
    assert "will not close" in caplog.text
