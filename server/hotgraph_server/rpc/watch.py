"""Hearing of the graph cache's events on the event loop. The capture thread is never held up, however slow a reader is.

The cache's own log is the queue: a listener only wakes those who wait, and they read on from their last sequence number. So
events come in order and without gaps, whichever thread made them, and a reader that falls behind the log is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import graphcache
from graphcache import GraphCache
from hotgraph_server.batch import StepKey
from hotgraph_server.errors import DrainingError, EventsGoneError

STOPPING_RETRY_SECONDS = 1.0


class EventHub:
    """Wakes coroutines when the cache has new events. Made and closed on the event loop."""

    def __init__(self, cache: GraphCache[StepKey]) -> None:
        self._cache = cache
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._is_wake_scheduled = False
        self._is_closed = False
        cache.add_listener(self._on_event)

    def close(self) -> None:
        """Everyone who follows or waits ends with DrainingError."""
        self._is_closed = True
        self._cache.remove_listener(self._on_event)
        self._wake()

    def _on_event(self, _: Any) -> None:
        """On whichever thread made the event."""
        if not self._is_wake_scheduled and not self._is_closed:
            self._is_wake_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_wake_scheduled = False  # before anyone looks, so that an event during the look wakes again
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Returns at the next event, or spuriously. Raises DrainingError once closed."""
        self._raise_if_closed()
        await self._news.wait()
        self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise DrainingError("the server is stopping", retry_after_seconds=STOPPING_RETRY_SECONDS)

    async def follow(self, after_sequence: int | None) -> AsyncIterator[graphcache.Event[StepKey]]:
        """Events after this one, 0 for all that are kept, None for those from now on; without end.

        Raises EventsGoneError when events in between are no longer kept, and DrainingError once closed.
        """
        is_gap_allowed = after_sequence == 0  # "all kept" starts wherever the log starts
        last = self._cache.last_sequence if after_sequence is None else after_sequence
        while True:
            self._raise_if_closed()
            news = self._news  # before the look, so that no event is missed
            events = self._events(last)
            if events and events[0].sequence != last + 1 and not is_gap_allowed:
                raise EventsGoneError("the reader fell behind the events that are kept")
            for event in events:
                is_gap_allowed = False
                last = event.sequence
                yield event
            if not events:
                await news.wait()

    def _events(self, after_sequence: int) -> list[graphcache.Event[StepKey]]:
        try:
            return self._cache.events(after_sequence)
        except graphcache.EventsGoneError as error:
            raise EventsGoneError(
                f"events right after {after_sequence} are not kept; the last is {error.last_sequence}",
                metadata={
                    "oldest_sequence": str(error.oldest_sequence),
                    "last_sequence": str(error.last_sequence),
                },
            ) from None
