"""The blocking twins of `stream.py`, over gRPC's own blocking channel: no event loop, and no thread but for limited reads.

A stream has one reader; `cancel` may be called from any thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from hotgraph.v1 import inference_service_pb2
from hotgraph_client.errors import HotgraphError, StreamLostError
from hotgraph_client.limits import limit
from hotgraph_client.resume import Attempt, GenerationProgress, StreamState
from hotgraph_client.status import error_from_call
from hotgraph_client.types import Choice, Completion, Event, Started

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)
T = TypeVar("T")

SETTLE_SECONDS = 1.0  # how long the status after the last event may take


class SyncCall(Protocol[MessageT_co]):
    """What is used of gRPC's call object."""

    def __next__(self) -> Any: ...

    def cancel(self) -> Any: ...


# gRPC's default hands every event of a stream from a thread of its own to the reader, and starts that thread anew for a lone
# stream. With this the reader waits for them itself.
READ_BY_THE_READER = ("SingleThreadedUnaryStream", 1)  # grpc.experimental.ChannelOptions


class _Connection(Generic[MessageT]):
    """One call of a stream, ended for good when this object goes.

    With READ_BY_THE_READER gRPC frees a call only once all its events were taken, of which its own iteration leaves some
    when the call is cancelled. They are taken here, by the reader or, when there is none, by who cancels.
    """

    def __init__(self, call: SyncCall[MessageT]) -> None:
        self._call = call
        self._is_idle = False
        self._lock = threading.Lock()  # over the three below
        self._is_read = False  # by some thread, right now
        self._is_ended = False
        self._is_taken = False  # all there was, or all there will be

    def read(self, idle_seconds: float | None = None) -> MessageT | None:
        """The next message; None when the stream ended with OK. Raises HotgraphError for any other status."""
        idle_limit = None if idle_seconds is None else limit(idle_seconds, self._end_idle)
        self._is_read = True
        try:
            message: MessageT = next(self._call)
        except StopIteration:
            self._is_ended = True
            return None
        except grpc.RpcError as error:
            self._is_ended = True
            if self._is_idle:
                raise StreamLostError(f"no event for {idle_seconds} seconds") from None
            raise error_from_call(error) from None
        except BaseException:
            self._is_taken = True  # an interrupt: gRPC has let go of the call already
            raise
        finally:
            with self._lock:
                self._is_read = False
            if self._is_ended:
                self._take_the_rest()
            if idle_limit is not None:
                idle_limit.lift()
        return message

    def _end_idle(self) -> None:
        self._is_idle = True
        self.cancel()

    def cancel(self) -> None:
        """From any thread, at any time; nothing happens to a call that has ended."""
        self._call.cancel()
        self._is_ended = True
        self._take_the_rest()

    def _take_the_rest(self) -> None:
        """Of an ended call. While a reader is inside it is left to him: he is on his way out."""
        with self._lock:
            if self._is_read or self._is_taken or sys.is_finalizing():
                return
            self._is_taken = True
        _take_events(self._call)

    def __del__(self) -> None:
        self.cancel()


def _take_events(call: Any) -> None:
    """Takes the events of an ended call that were not taken. There is no public way, and calls of other kinds need none."""
    take = getattr(call, "_consume_next_event", None)
    state = getattr(call, "_state", None)
    while take is not None and state is not None and state.due:
        take()


class EventStream(Generic[T]):
    """Events of a watch, until the caller leaves. An iterator and a context manager."""

    def __init__(self, call: SyncCall[MessageT], decode: Callable[[MessageT], T]) -> None:
        self._connection = _Connection(call)
        self._decode = decode
        self._is_closed = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            message = None if self._is_closed else self._connection.read()
        except HotgraphError:
            if self._is_closed:
                raise StopIteration from None
            raise
        if message is None:
            raise StopIteration
        return self._decode(message)

    def cancel(self) -> None:
        """Ends the call; the iteration ends too."""
        self._is_closed = True
        self._connection.cancel()

    def close(self) -> None:
        """The same."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


GenerateCall = SyncCall[inference_service_pb2.GenerateResponse]


class Generation:
    """One generation: an iterator of Started, Tokens and Finished, and a context manager.

    The call is under way as soon as the object is there. After a lost server it goes on on a new connection without the
    reader noticing, as `resume` and the client's ResumePolicy allow.
    """

    def __init__(self, progress: GenerationProgress, open_call: Callable[[Attempt], GenerateCall]) -> None:
        self._progress = progress
        self._open_call = open_call
        self._lock = threading.Lock()  # `cancel` comes from other threads
        self._cancelled = threading.Event()
        self._is_settled = False
        self._wait_seconds = 0.0
        self._connection = _Connection(open_call(progress.open()))

    def __repr__(self) -> str:
        return f"<Generation {self._progress.describe()}>"

    @property
    def started(self) -> Started | None:
        """The first event, once it came."""
        return self._progress.started

    @property
    def text(self) -> str:
        """The text of the first choice so far."""
        return self._progress.text

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice as far as it came."""
        return self._progress.choices

    @property
    def num_resumes(self) -> int:
        """Times that another connection went on so far."""
        return self._progress.num_resumes

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """The next event. Raises HotgraphError; after `cancel`, CancelledRequestError. An interrupt ends the call."""
        progress = self._progress
        while not progress.is_ended:
            try:
                event = self._advance()
            except BaseException:  # an interrupt too
                self.cancel()
                raise
            if event is not None:
                return event
        if progress.error is not None:
            raise progress.error
        self._settle()
        raise StopIteration

    def _advance(self) -> Event | None:
        """Reads one message, or waits and opens the next connection."""
        progress = self._progress
        if progress.state is StreamState.LOST:
            if self._cancelled.wait(self._wait_seconds):
                return None
            with self._lock:
                if progress.is_ended:
                    return None
                self._connection = _Connection(self._open_call(progress.open()))
        message, error = None, None
        try:
            message = self._connection.read(progress.policy.idle_seconds if progress.is_idle_bounded else None)
        except HotgraphError as caught:
            error = caught
        with self._lock:
            if progress.is_ended:  # cancelled meanwhile
                return None
            if message is not None:
                return progress.receive(message)
            outcome = progress.lose(error)
            if isinstance(outcome, float):
                self._wait_seconds = outcome
                return None
            return outcome

    def _settle(self) -> None:
        """Lets a finished call end by itself: a cancel now would look to the server as if the caller had left."""
        if self._is_settled:
            return
        self._is_settled = True
        try:
            self._connection.read(SETTLE_SECONDS)
        except HotgraphError:
            self._connection.cancel()  # everything is here already

    def result(self) -> Completion:
        """Reads what is left; the whole answer, events already read included. Raises as the iteration does."""
        for _ in self:
            pass
        return self._progress.completion()

    def cancel(self) -> bool:
        """Ends it; the server frees its place at the next step. A waiting reader gets CancelledRequestError.

        False when it had ended.
        """
        with self._lock:
            is_cancelled = self._progress.cancel()
        self._cancelled.set()
        self._connection.cancel()
        return is_cancelled

    def close(self) -> None:
        """Ends it if it has not ended. Idempotent."""
        if self._progress.finished is not None:
            self._settle()
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
