"""A gap between two steps on the serving stream, into which a part of a capture's work goes. It knows streams and events only.

Two kernels that share the device slow each other down by more than either takes: a step that reads memory as fast as it can
has its blocks spread evenly, and a stranger's block among them makes all others wait. So what a capture has to run goes between
steps, where it costs a step what it takes and no more.
"""

from __future__ import annotations

from collections.abc import Callable

from graphcache.backends.cuda_runtime import Runtime


class StepGap:
    """One gap at a time. `before_step` and `after_step` are for the serving thread, all else is for the capture thread.

    The capture thread wants a gap; the serving thread marks the end of the next step it launches; behind that mark the part
    goes, on its own stream, and the step after goes behind the part. Nobody waits for what is not on the device yet: a part
    that is late runs beside the step it should have preceded.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._current_stream: Callable[[], int] = _no_stream
        self._step_end = self._part_end = 0  # events
        self._is_wanted = False
        self._is_marked = False  # a step's end, since a gap is wanted
        self._part: int | None = None  # the event behind which the next step goes

    def open(self, current_stream: Callable[[], int]) -> None:
        """`current_stream`: the calling thread's. Raises CudaCallError."""
        self._current_stream = current_stream
        self._step_end, self._part_end = self._runtime.make_event(), self._runtime.make_event()

    def close(self) -> list[int]:
        """From now on steps are not told of. Returns the events, for the caller to destroy."""
        self._is_wanted, self._part = False, None
        events = [event for event in (self._step_end, self._part_end) if event]
        self._step_end = self._part_end = 0
        return events

    def before_step(self) -> None:
        """What is put on the current stream from now on goes behind the part that was let in. Raises CudaCallError."""
        part = self._part
        if part is not None:
            self._part = None
            self._runtime.wait_event(self._current_stream(), part)

    def after_step(self) -> None:
        """A part may go behind what is on the current stream now. Raises CudaCallError."""
        if self._is_wanted:
            self._is_wanted = False
            self._runtime.record_event(self._step_end, self._current_stream())
            self._is_marked = True

    def enter(self, stream: int, wait: Callable[[], None]) -> None:
        """What is put on `stream` from now on goes behind a step that is launched during `wait`, if there is one."""
        self._is_marked = False
        self._is_wanted = True
        try:
            wait()
        finally:
            self._is_wanted = False
        if self._is_marked:
            self._runtime.wait_event(stream, self._step_end)

    def leave(self, stream: int) -> None:
        """What is on `stream` is the whole part: the next step goes behind it."""
        if self._is_marked:
            self._is_marked = False
            self._runtime.record_event(self._part_end, stream)
            self._part = self._part_end

    def settle(self) -> None:
        """The part is over: nobody has to go behind it any more."""
        self._part = None


def _no_stream() -> int:
    raise RuntimeError("the gap is not open")
