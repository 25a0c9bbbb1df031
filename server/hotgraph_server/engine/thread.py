"""The forward thread: the one thread that makes serving torch calls. It runs what it is given, in order, and knows no steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class ForwardThread:
    """A thread with a queue. `submit` is for the event loop, `call` for any other thread."""

    def __init__(self, name: str = "forward") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the forward thread."""
        return threading.current_thread() is self._thread

    def submit(self, work: Callable[[], T], *, on_done: Callable[[], None] | None = None) -> asyncio.Future[T]:
        """Queues `work`; the future belongs to the running loop and holds its result or exception.

        Raises RuntimeError after `close`. A future that was cancelled does not keep the work from running. `on_done` is
        called on the loop when the work is done, before anyone can see the result: a done callback of the future would
        come after whoever finds it done without waiting.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if on_done is not None:
                on_done()
            if future.done():
                return  # the caller left
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where T has it

        def job() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as caught:  # handed to the caller, whatever it is
                error = caught
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                # The loop ended before the work did: nobody is left to hear of it.

        self._put(job)
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` between two steps and waits for it. Raises what it raises; RuntimeError after `close`."""
        if self.is_current:
            return work()
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(work())
            except BaseException as caught:  # handed to the caller, whatever it is
                future.set_exception(caught)

        self._put(job)
        return future.result()

    def close(self) -> None:
        """Ends the thread once its queue is empty, and waits for it. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._jobs.put(None)
        if self._thread.ident is not None and not self.is_current:
            self._thread.join()

    def _put(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the forward thread is closed")
            self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
