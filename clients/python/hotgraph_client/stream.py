"""Streams a caller reads: generations and watches, for asyncio. Each ends its call when it is closed, cancelled or dropped.

gRPC does not end the call of a stream that is only forgotten, so the server would work on; every stream here does, in
`close`, on leaving its `async with`, when the reading task is cancelled, and when the object goes. The blocking twins are in
`sync_stream.py`; what a lost connection means is in `resume.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
import grpc.aio

from hotgraph.v1 import inference_service_pb2
from hotgraph_client.errors import CancelledRequestError, HotgraphError, InternalError, StreamLostError
from hotgraph_client.resume import Attempt, GenerationProgress, StreamState
from hotgraph_client.status import error_from_call
from hotgraph_client.types import Choice, Completion, Event, Started

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)
T = TypeVar("T")

SETTLE_SECONDS = 1.0  # how long the status after the last event may take


class AsyncCall(Protocol[MessageT_co]):
    """What is used of gRPC's call object."""

    async def read(self) -> Any: ...

    def cancel(self) -> bool: ...


class _Connection(Generic[MessageT]):
    """One call of a stream, ended for good when this object goes."""

    def __init__(self, call: AsyncCall[MessageT]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.is_over = False

    async def read(self) -> MessageT | None:
        """The next message; None when the stream ended with OK. Raises HotgraphError for any other status.

        A cancelled task cancels the call.
        """
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            self.is_over = True
            raise error_from_call(error) from None
        except BaseException:
            self.cancel()
            raise
        if message is grpc.aio.EOF:
            self.is_over = True
            return None
        if message is None:  # gRPC's way to tell that the bytes were no message
            self.cancel()
            raise InternalError("the server sent a message that cannot be read")
        result: MessageT = message
        return result

    def cancel(self) -> None:
        """From any thread, at any time."""
        if self.is_over or self._loop.is_closed():
            return
        self.is_over = True
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            self._call.cancel()
        else:
            self._loop.call_soon_threadsafe(self._call.cancel)

    def __del__(self) -> None:
        if hasattr(self, "is_over"):
            self.cancel()


class AsyncEventStream(Generic[T]):
    """Events of a watch, until the caller leaves. An async iterator and an async context manager."""

    def __init__(self, call: AsyncCall[MessageT], decode: Callable[[MessageT], T]) -> None:
        self._connection = _Connection(call)
        self._decode = decode
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            message = await self._connection.read()
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            if self._is_closed:
                raise StopAsyncIteration from None
            raise CancelledRequestError("the client was closed") from None
        if message is None:
            raise StopAsyncIteration
        return self._decode(message)

    def cancel(self) -> None:
        """Ends the call; the iteration ends too."""
        self._is_closed = True
        self._connection.cancel()

    async def close(self) -> None:
        """The same."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


GenerateCall = AsyncCall[inference_service_pb2.GenerateResponse]


class AsyncGeneration:
    """One generation: an async iterator of Started, Tokens and Finished, and an async context manager.

    The call is under way as soon as the object is there. For one reader. After a lost server it goes on on a new connection
    without the reader noticing, as `resume` and the client's ResumePolicy allow.
    """

    def __init__(self, progress: GenerationProgress, open_call: Callable[[Attempt], GenerateCall]) -> None:
        self._progress = progress
        self._open_call = open_call
        self._cancelled = asyncio.Event()
        self._wait_seconds = 0.0
        self._connection = _Connection(open_call(progress.open()))

    def __repr__(self) -> str:
        return f"<AsyncGeneration {self._progress.describe()}>"

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

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises HotgraphError; after `cancel`, CancelledRequestError. A cancelled task ends the call."""
        progress = self._progress
        while not progress.is_ended:
            try:
                event = await self._advance()
            except asyncio.CancelledError:
                progress.cancel()
                self._connection.cancel()
                if is_task_cancelled():
                    raise
                break  # only the call was: by `cancel`, or with the client's channel
            except HotgraphError:
                self._connection.cancel()
                raise
            if event is not None:
                return event
        if progress.error is not None:
            raise progress.error
        await self._settle()
        raise StopAsyncIteration

    async def _advance(self) -> Event | None:
        """Reads one message, or waits and opens the next connection."""
        progress = self._progress
        if progress.state is StreamState.LOST:
            if await self._is_cancelled_within(self._wait_seconds):
                return None
            self._connection = _Connection(self._open_call(progress.open()))
        error: HotgraphError | None = None
        try:
            async with asyncio.timeout(progress.policy.idle_seconds if progress.is_idle_bounded else None):
                message = await self._connection.read()
        except TimeoutError:
            message, error = None, StreamLostError(f"no event for {progress.policy.idle_seconds} seconds")
        except HotgraphError as caught:
            message, error = None, caught
        if progress.is_ended:  # cancelled meanwhile
            return None
        if message is not None:
            return progress.receive(message)
        outcome = progress.lose(error)
        if isinstance(outcome, float):
            self._wait_seconds = outcome
            return None
        return outcome

    async def _is_cancelled_within(self, wait_seconds: float) -> bool:
        try:
            async with asyncio.timeout(wait_seconds):
                await self._cancelled.wait()
        except TimeoutError:
            return False
        return True

    async def _settle(self) -> None:
        """Lets a finished call end by itself: a cancel now would look to the server as if the caller had left."""
        if self._progress.finished is None or self._connection.is_over:
            return
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._connection.read()
        except (TimeoutError, HotgraphError):
            self._connection.cancel()  # everything is here already

    async def result(self) -> Completion:
        """Reads what is left; the whole answer, events already read included. Raises as the iteration does."""
        async for _ in self:
            pass
        return self._progress.completion()

    def cancel(self) -> bool:
        """Ends it; the server frees its place at the next step. A waiting reader gets CancelledRequestError.

        False when it had ended.
        """
        is_cancelled = self._progress.cancel()
        self._cancelled.set()
        self._connection.cancel()
        return is_cancelled

    async def close(self) -> None:
        """Ends it if it has not ended. Idempotent."""
        await self._settle()
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def is_task_cancelled() -> bool:
    """Whether the running task itself was asked to end, rather than only the call it reads."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
