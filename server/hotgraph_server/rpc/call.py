"""One call of our services, as who counts, logs and traces sees it: from its headers to its last word. No text of users."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc.aio

from hotgraph_server.rpc.status import CallStatus

logger = logging.getLogger("hotgraph.calls")

Context = grpc.aio.ServicerContext[Any, Any]
TRACE_KEYS: Final = frozenset({"traceparent", "tracestate"})  # of W3C's Trace Context


@dataclass(slots=True)
class Call:
    """`method` is the full name, one of those that are served. Times are seconds on time.monotonic."""

    method: str
    trace_context: Mapping[str, str] = field(default_factory=dict)
    begin_time: float = field(default_factory=time.monotonic)
    end_time: float = 0.0
    request_id: str = ""
    code: str = ""  # empty while it goes on
    reason: str = ""  # a name of the contract's ErrorReason, when it failed

    @property
    def seconds(self) -> float:
        return self.end_time - self.begin_time

    def fail(self, status: CallStatus, reason: str) -> None:
        """It is about to end with this status."""
        self.code, self.reason = status.code.name, reason

    def leave(self, context: Context) -> None:
        """Nobody can be told how it ends: the caller left, its deadline passed, or the connection is gone."""
        if not self.code:
            remaining_seconds = context.time_remaining()
            is_late = remaining_seconds is not None and remaining_seconds <= 0
            self.code = self.reason = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"

    def end(self, observer: CallObserver | None) -> None:
        """It is over. Says so to the log, below a warning: whoever calls may fail as often as they like."""
        self.end_time = time.monotonic()
        self.code = self.code or "OK"
        level = logging.DEBUG if self.code == "OK" else logging.INFO
        if logger.isEnabledFor(level):
            fields = {"method": self.method, "code": self.code, "seconds": round(self.seconds, 6)}
            if self.reason:
                fields["reason"] = self.reason
            if self.request_id:
                fields["request_id"] = self.request_id
            logger.log(level, "call ended", extra=fields)
        if observer is not None:
            observer.call_ended(self)


class CallObserver(Protocol):
    """On the event loop; must be quick, and must not raise."""

    def call_begun(self, call: Call) -> None:
        """Its request is read, and has its id."""
        ...

    def call_ended(self, call: Call) -> None: ...


def trace_context(context: Context) -> dict[str, str]:
    """What the caller's tracing sent along."""
    return {key: str(value) for key, value in context.invocation_metadata() or () if key in TRACE_KEYS}
