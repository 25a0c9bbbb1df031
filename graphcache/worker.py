"""The capture thread's life: one thread that takes steps until it is closed, whatever a step does. It knows no graphs."""

from __future__ import annotations

import enum
import logging
import threading
from typing import Protocol

log = logging.getLogger("graphcache")

CAPTURE_THREAD_NAME = "graphcache-capture"
RETRY_SECONDS = 1.0  # after a step that raised


class WorkerState(enum.Enum):
    NEW = "new"
    RUNNING = "running"
    CLOSED = "closed"


WORKER_TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.NEW: frozenset({WorkerState.RUNNING, WorkerState.CLOSED}),
    WorkerState.RUNNING: frozenset({WorkerState.CLOSED}),
    WorkerState.CLOSED: frozenset(),
}


class Task(Protocol):
    """What the worker does; all of it on one thread."""

    def open(self) -> None:
        """First."""
        ...

    def step(self) -> float:
        """Does what can be done; returns after how many seconds to come again unless woken."""
        ...

    def shut(self) -> None:
        """Last."""
        ...


class Signal:
    """Wakes the capture thread. Setting it is cheap, and setting it twice is setting it once."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def set(self) -> None:
        """Has the next step taken at once. From any thread."""
        self._woken.set()

    def wait(self, seconds: float) -> None:
        """Returns when set, or after so many seconds. For the capture thread only."""
        self._woken.wait(seconds)
        self._woken.clear()


class Worker:
    """Owns the thread. Without one (`is_threaded` False), `start` and `close` run the task's ends on the calling thread,
    and its steps are somebody else's business."""

    def __init__(self, task: Task, signal: Signal, *, is_threaded: bool) -> None:
        self._task = task
        self._signal = signal
        self._thread = (
            threading.Thread(target=self._run, name=CAPTURE_THREAD_NAME, daemon=True) if is_threaded else None
        )
        self._changing = threading.Lock()
        self.state = WorkerState.NEW

    def __repr__(self) -> str:
        return f"Worker({self.state.value})"

    @property
    def is_threaded(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Raises RuntimeError when it was started or closed before."""
        with self._changing:
            self._move(WorkerState.RUNNING)
        if self._thread is not None:
            self._thread.start()
        else:
            self._open()

    def close(self) -> None:
        """Lets the step under way end, shuts the task and returns when that is done. May be called again."""
        with self._changing:
            before = self.state
            if before is not WorkerState.CLOSED:
                self._move(WorkerState.CLOSED)
        if before is WorkerState.RUNNING and self._thread is not None:
            self._signal.set()
        elif before is not WorkerState.CLOSED:
            self._shut()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._open()
        while self.state is WorkerState.RUNNING:
            try:
                delay_seconds = self._task.step()
            except Exception:
                log.exception("a step of the capture thread failed; it goes on")
                delay_seconds = RETRY_SECONDS
            if self.state is WorkerState.RUNNING and delay_seconds > 0:
                self._signal.wait(delay_seconds)
        self._shut()

    def _open(self) -> None:
        try:
            self._task.open()
        except Exception:
            log.exception("the capture thread's preparation failed; the first capture tries again")

    def _shut(self) -> None:
        try:
            self._task.shut()
        except Exception:
            log.exception("the capture thread did not shut cleanly")

    def _move(self, state: WorkerState) -> None:
        if state not in WORKER_TRANSITIONS[self.state]:
            raise RuntimeError(f"a worker that is {self.state.value} cannot become {state.value}")
        self.state = state
