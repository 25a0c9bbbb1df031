"""When a request passes which place of the daemon. Stamps are set from outside: the daemon's own code carries none.

It knows the daemon's methods by name, and that requests come one at a time. Times are seconds of `time.perf_counter`, which
on Linux is the monotonic clock that every process of the machine shares.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from hotgraph_server.rpc.guard import Guard
from hotgraph_server.rpc.inference import InferenceServicer
from hotgraph_server.rpc.wire import generation
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.scheduler.stream import RequestStream

CALL: Final = "call"  # gRPC has told the event loop of a call
MESSAGE: Final = "message"  # its message is there
HANDLER: Final = "handler"  # the servicer's method runs
SUBMIT: Final = "submit"  # the scheduler is asked
STEP: Final = "step"  # the first step was given to the engine
WORK: Final = "work"  # the engine begins with it, in its thread
RESULT: Final = "result"  # the engine is done with it, still in its thread
TOKEN: Final = "token"  # the scheduler hands its token to the stream
WRITE: Final = "write"  # the servicer begins to write it

Stamps = dict[str, float]


class Trace:
    """Stamps of all requests, in order of arrival. A place that a request passes twice counts the first time."""

    def __init__(self) -> None:
        self.requests: list[Stamps] = []

    def begin(self) -> None:
        """A call has come."""
        self.requests.append({CALL: time.perf_counter()})

    def mark(self, name: str) -> None:
        """The request that came last is at this place now."""
        if self.requests:
            self.requests[-1].setdefault(name, time.perf_counter())

    def before(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which marks each time it is called."""

        @functools.wraps(method)
        def marked(*arguments: Any, **named: Any) -> Any:
            self.mark(name)
            return method(*arguments, **named)

        return marked

    def install(self) -> None:
        """From now on every daemon of this process is traced: to be called once, in a process that does nothing else."""
        intercept = Guard.intercept_service

        def intercepted(*arguments: Any, **named: Any) -> Awaitable[Any]:
            self.begin()
            return intercept(*arguments, **named)

        replace(Guard, "intercept_service", intercepted)
        replace(Guard, "_run", self.before(MESSAGE, Guard._run))
        replace(InferenceServicer, "Generate", self.before(HANDLER, InferenceServicer.Generate))
        replace(Scheduler, "submit", self.before(SUBMIT, Scheduler.submit))
        replace(RequestStream, "put", self.before(TOKEN, RequestStream.put))
        replace(generation, "tokens_message", self.before(WRITE, generation.tokens_message))


def replace(owner: Any, name: str, value: Any) -> None:
    """Raises AttributeError when there is nothing of this name: a trace of what is no more would be empty, and silent."""
    getattr(owner, name)
    setattr(owner, name, value)
