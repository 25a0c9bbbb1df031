"""Tests of worker.py."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest

from graphcache.worker import CAPTURE_THREAD_NAME, WORKER_TRANSITIONS, Signal, Worker, WorkerState

DEADLINE_SECONDS = 30.0


class RecordingTask:
    """Notes what is called, on which thread."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.stepped = threading.Semaphore(0)
        self.failures: list[Exception] = []
        self.open_failure: Exception | None = None

    def open(self) -> None:
        self._note("open")
        if self.open_failure is not None:
            raise self.open_failure

    def step(self) -> float:
        self._note("step")
        try:
            if self.failures:
                raise self.failures.pop()
        finally:
            self.stepped.release()
        return DEADLINE_SECONDS

    def shut(self) -> None:
        self._note("shut")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WorkerState, WorkerState)))
def test_only_listed_transitions_happen(before: WorkerState, after: WorkerState) -> None:
    """Every pair of states is either in the table and moves, or is refused."""
    worker = Worker(RecordingTask(), Signal(), is_threaded=False)
    worker.state = before
    if after in WORKER_TRANSITIONS[before]:
        worker._move(after)
        assert worker.state is after
    else:
        with pytest.raises(RuntimeError, match=before.value):
            worker._move(after)
        assert worker.state is before


def test_everything_runs_on_one_thread_in_order() -> None:
    """open, steps and shut run on the worker's own thread, in that order; a signal brings the next step."""
    task, signal = RecordingTask(), Signal()
    worker = Worker(task, signal, is_threaded=True)
    worker.start()
    assert task.stepped.acquire(timeout=DEADLINE_SECONDS)
    signal.set()
    assert task.stepped.acquire(timeout=DEADLINE_SECONDS)
    worker.close()
    assert task.calls == ["open", "step", "step", "shut"]
    assert task.threads == {CAPTURE_THREAD_NAME}
    assert repr(worker) == "Worker(closed)"


def test_a_failing_step_is_logged_and_the_thread_lives(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a failing start nor a failing step ends the thread."""
    task, signal = RecordingTask(), Signal()
    task.open_failure = RuntimeError("cannot open")
    task.failures.append(RuntimeError("cannot step"))
    worker = Worker(task, signal, is_threaded=True)
    with caplog.at_level(logging.ERROR, logger="graphcache"):
        worker.start()
        assert task.stepped.acquire(timeout=DEADLINE_SECONDS)
        signal.set()
        assert task.stepped.acquire(timeout=DEADLINE_SECONDS)
        worker.close()
    assert "cannot open" in caplog.text
    assert "cannot step" in caplog.text
    assert task.calls == ["open", "step", "step", "shut"]


def test_without_a_thread_the_ends_run_here() -> None:
    """Without a thread, start and close run the task's ends on the caller's thread and take no steps."""
    task = RecordingTask()
    worker = Worker(task, Signal(), is_threaded=False)
    worker.start()
    worker.close()
    worker.close()
    assert task.calls == ["open", "shut"]
    assert task.threads == {threading.current_thread().name}


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_life_is_lived_once(is_threaded: bool) -> None:
    """A worker starts once, not after it was closed, and closing it before it started still shuts the task."""
    task = RecordingTask()
    worker = Worker(task, Signal(), is_threaded=is_threaded)
    worker.close()
    assert task.calls == ["shut"]
    with pytest.raises(RuntimeError, match="closed"):
        worker.start()
