"""The stream of one request's events, from the scheduler's loop to whoever reads. Tokens gather while the reader is busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from hotgraph_server.errors import HotgraphError
from hotgraph_server.request import Event, FinishedEvent, Request, TokensEvent


class RequestStream(AsyncIterator[Event]):
    """Events of one request: for each choice its tokens in order, then one FinishedEvent; or a HotgraphError instead.

    Tokens of one choice that arrive before the reader is back are one event. What was received before an error is
    delivered before the error. Closing it, by `close` or by leaving `async with`, cancels the request if it still runs.
    One reader.
    """

    def __init__(self, request: Request, on_close: Callable[[], None]) -> None:
        self.request = request
        self._on_close = on_close
        self._pending: dict[int, TokensEvent] = {}  # by choice, in the order of arrival
        self._end: FinishedEvent | HotgraphError | None = None
        self._is_closed = False
        self._reader: asyncio.Future[None] | None = None

    # The scheduler's side.

    def put(self, event: TokensEvent) -> None:
        """Adds tokens; joins them to those of the same choice that were not read yet."""
        pending = self._pending.get(event.choice_index)
        if pending is None:
            self._pending[event.choice_index] = event
        else:
            pending.token_ids += event.token_ids
            pending.text += event.text
            pending.logprobs += event.logprobs
            pending.finish = event.finish
        self._wake()

    def end(self, end: FinishedEvent | HotgraphError) -> None:
        """Nothing comes after this. The first end counts."""
        if self._end is None:
            self._end = end
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # The reader's side.

    async def __anext__(self) -> Event:
        while True:
            if self._pending:
                return self._pending.pop(next(iter(self._pending)))
            if self._is_closed:
                raise StopAsyncIteration
            if isinstance(self._end, HotgraphError):
                raise self._end
            if self._end is not None:
                self._is_closed = True
                return self._end
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def wait(self, seconds: float) -> None:
        """Returns when the next event is there, which it does not take, or when the time is over. For the one reader."""
        if self._pending or self._is_closed or self._end is not None:
            return
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._reader
        finally:
            self._reader = None
            timer.cancel()

    def close(self) -> None:
        """Cancels the request if it still runs. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._pending.clear()
            self._wake()
        if self._end is None:
            self._on_close()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
