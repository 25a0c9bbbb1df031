"""Tests of backends/fake.py."""

from __future__ import annotations

import threading

import pytest

from graphcache import CaptureError, FakeBackend, FakeClock, FakeProgram, GraphStateError


def test_durations_pass_on_the_fake_clock() -> None:
    """Recording and instantiating take the set time on a fake clock, and none of anyone's life."""
    clock = FakeClock()
    backend = FakeBackend(clock, record_seconds=7.0, instantiate_seconds=3.0)
    captured = backend.capture("a", lambda: None)
    assert clock.monotonic() == 10.0
    assert (captured.record_seconds, captured.instantiate_seconds) == (7.0, 3.0)


def test_bytes_and_failures_by_name() -> None:
    """Sizes and failures are set by name, and a failed capture leaves nothing."""
    backend = FakeBackend(size_bytes=5)
    backend.sizes["b"] = 9
    backend.failures["c"] = "broken"
    assert backend.capture("a", lambda: None).size_bytes == 5
    assert backend.capture("b", lambda: None).size_bytes == 9
    with pytest.raises(CaptureError, match="broken"):
        backend.capture("c", lambda: None)
    assert [captured.name for captured in backend.live] == ["a", "b"]


def test_it_refuses_what_must_never_be_done() -> None:
    """A replay after destroy and a second destroy are errors."""
    backend = FakeBackend()
    captured = backend.capture("a", lambda: None)
    captured.replay()
    captured.destroy()
    assert backend.num_replays["a"] == 1
    with pytest.raises(GraphStateError, match="replayed after"):
        captured.replay()
    with pytest.raises(GraphStateError, match="twice"):
        captured.destroy()


def test_it_refuses_other_threads() -> None:
    """Once started, captures from another thread are errors."""
    backend = FakeBackend()
    thread = threading.Thread(target=backend.start, args=(lambda: None,))
    thread.start()
    thread.join(30)
    with pytest.raises(GraphStateError, match="thread"):
        backend.capture("a", lambda: None)


def test_program() -> None:
    """The fake program counts runs, fails to bind and to verify as told."""
    program = FakeProgram()
    work = program.bind("a")
    work()
    assert program.verify("a", work)
    assert program.num_runs["a"] == 2
    program.mismatches.add("a")
    assert not program.verify("a", work)
    program.failures["b"] = CaptureError("no")
    with pytest.raises(CaptureError):
        program.bind("b")


def test_warming_up_runs_the_work_and_is_counted() -> None:
    """A warm-up runs its work once."""
    runs: list[int] = []
    backend = FakeBackend()
    backend.warm_up(lambda: runs.append(1))
    assert (runs, backend.num_warm_ups) == ([1], 1)
