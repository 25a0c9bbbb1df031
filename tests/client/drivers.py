"""One face for both clients, so that one test holds for both: the blocking one runs in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from hotgraph_client import AsyncClient, Client, Completion, Event


class Driver(Protocol):
    """A client as the tests use it."""

    client: Any

    async def events(self, prompt: Any = "go on", **options: Any) -> list[Event]:
        """Every event of a generation."""
        ...

    async def result(
        self, prompt: Any = "go on", *, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Completion:
        """The whole of a generation; each event is shown to `on_event` as it comes, in the client's thread."""
        ...

    async def partial(self, prompt: Any = "go on", **options: Any) -> tuple[list[Event], BaseException | None]:
        """The events until the end, and the error that ended them."""
        ...

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The answer of any other call."""
        ...

    async def first(self, name: str, num_items: int, *arguments: Any, **options: Any) -> list[Any]:
        """The first items of a watch, which is then closed."""
        ...


class AsyncDriver:
    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def events(self, prompt: Any = "go on", **options: Any) -> list[Event]:
        return [event async for event in self.client.generate(prompt, **options)]

    async def result(
        self, prompt: Any = "go on", *, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Completion:
        generation = self.client.generate(prompt, **options)
        if on_event is not None:
            async for event in generation:
                on_event(event)
        completion: Completion = await generation.result()
        return completion

    async def partial(self, prompt: Any = "go on", **options: Any) -> tuple[list[Event], BaseException | None]:
        events: list[Event] = []
        try:
            async for event in self.client.generate(prompt, **options):
                events.append(event)  # noqa: PERF401  # the events before an error are wanted
        except Exception as error:
            return events, error
        return events, None

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return await getattr(self.client, name)(*arguments, **options)

    async def first(self, name: str, num_items: int, *arguments: Any, **options: Any) -> list[Any]:
        async with getattr(self.client, name)(*arguments, **options) as stream:
            return [await anext(stream) for _ in range(num_items)]


class SyncDriver:
    def __init__(self, client: Client) -> None:
        self.client = client

    async def events(self, prompt: Any = "go on", **options: Any) -> list[Event]:
        return await asyncio.to_thread(lambda: list(self.client.generate(prompt, **options)))

    async def result(
        self, prompt: Any = "go on", *, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Completion:
        def read() -> Completion:
            generation = self.client.generate(prompt, **options)
            if on_event is not None:
                for event in generation:
                    on_event(event)
            completion: Completion = generation.result()
            return completion

        return await asyncio.to_thread(read)

    async def partial(self, prompt: Any = "go on", **options: Any) -> tuple[list[Event], BaseException | None]:
        def read() -> tuple[list[Event], BaseException | None]:
            events: list[Event] = []
            try:
                events.extend(self.client.generate(prompt, **options))
            except Exception as error:
                return events, error
            return events, None

        return await asyncio.to_thread(read)

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(lambda: getattr(self.client, name)(*arguments, **options))

    async def first(self, name: str, num_items: int, *arguments: Any, **options: Any) -> list[Any]:
        def read() -> list[Any]:
            with getattr(self.client, name)(*arguments, **options) as stream:
                return [next(stream) for _ in range(num_items)]

        return await asyncio.to_thread(read)


@asynccontextmanager
async def connected(kind: str, target: str, **settings: Any) -> AsyncIterator[Driver]:
    """A driver of the async or the sync client, closed at the end."""
    if kind == "async":
        async with AsyncClient(target, **settings) as client:
            yield AsyncDriver(client)
    else:
        blocking = Client(target, **settings)
        try:
            yield SyncDriver(blocking)
        finally:
            await asyncio.to_thread(blocking.close)
