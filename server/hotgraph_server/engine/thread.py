"""The forward thread: the one thread that makes serving torch calls. It runs what it is given, in order, and knows no steps.

On a GPU work is launched there and over later. A second thread waits for that and reads results, so that the next step is
launched meanwhile.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deferred(Generic[T]):
    """Work that is launched, whose result `finish` waits for and returns. Made by `ForwardThread.after_launched`."""

    finish: Callable[[], T]


Settle = Callable[["T | None", "BaseException | None"], None]


class ForwardThread:
    """A thread with a queue. `submit` and `launch` are for the event loop, `call` for any other thread.

    What `launch` and `call` run returns a `Deferred`: its result is the work's, and comes when it is over.
    """

    def __init__(self, device: torch.device | None = None, name: str = "forward") -> None:
        """`device`: on a CUDA device the thread gets a stream of its own there, of high priority."""
        self._device = device if device is not None and device.type == "cuda" else None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._stream: torch.cuda.Stream | None = None
        self._events: deque[torch.cuda.Event] = deque()  # that nobody waits for
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._reader = threading.Thread(target=self._read, name=f"{name}-reader", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._device is not None:
            self._reader.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the forward thread."""
        return threading.current_thread() is self._thread

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Queues `work`, of which nothing is left to wait for when it returns; else like `launch`."""

        def launch() -> Deferred[T]:
            result = work()
            return Deferred(lambda: result)

        return self.launch(launch)

    def launch(
        self, work: Callable[[], Deferred[T]], *, on_done: Callable[[], None] | None = None
    ) -> asyncio.Future[T]:
        """Queues `work`; the future belongs to the running loop and holds its result or exception.

        Raises RuntimeError after `close`. A future that was cancelled does not keep the work from running. `on_done` is
        called on the loop when the work is over, before anyone can see the result: a done callback of the future would
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

        def tell(result: T | None, error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                # The loop ended before the work did: nobody is left to hear of it.

        self._put(lambda: self._work(work, tell))
        return future

    def call(self, work: Callable[[], Deferred[T]]) -> T:
        """Runs `work` between two steps and waits for its end. Raises what it raises; RuntimeError after `close`."""
        if self.is_current:
            return work().finish()
        future: Future[T] = Future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where T has it

        self._put(lambda: self._work(work, tell))
        return future.result()

    def after_launched(self, read: Callable[[], T]) -> Deferred[T]:
        """`read`, once all that this thread launched until now is over. To be called on the forward thread.

        What `finish` raises is the work's own error too: a GPU tells of it late.
        """
        if self._device is None:
            return Deferred(read)
        # Nobody else takes one.
        event = self._events.popleft() if self._events else torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)

        def finish() -> T:
            event.synchronize()  # without the interpreter's lock
            self._events.append(event)
            return read()

        return Deferred(finish)

    def close(self) -> None:
        """Ends the threads once all work is over, and waits for them. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._jobs.put(None)
        for thread in (self._thread, self._reader):
            if thread.ident is not None and threading.current_thread() is not thread:
                thread.join()

    def _put(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the forward thread is closed")
            self._jobs.put(job)

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(self._stream)
        while (job := self._jobs.get()) is not None:
            job()
        self._launched.put(None)

    def _read(self) -> None:
        while (job := self._launched.get()) is not None:
            job()

    def _work(self, work: Callable[[], Deferred[T]], tell: Settle[T]) -> None:
        try:
            deferred = work()
        except BaseException as error:  # handed to the caller, whatever it is
            tell(None, error)
            return
        if self._device is None:
            self._finish(deferred, tell)
        else:
            self._launched.put(lambda: self._finish(deferred, tell))

    @staticmethod
    def _finish(deferred: Deferred[T], tell: Settle[T]) -> None:
        try:
            result = deferred.finish()
        except BaseException as error:  # handed to the caller, whatever it is
            tell(None, error)
        else:
            tell(result, None)
