"""A gRPC server that plays what a test tells it, and a relay whose connections a test can cut. Both live in the test's loop."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed

from hotgraph.v1 import admin_service_pb2_grpc, graph_service_pb2_grpc, inference_service_pb2_grpc
from hotgraph.v1.inference_service_pb2 import GenerateRequest
from tests.client import scripted_model

Context = grpc.aio.ServicerContext[Any, Any]
Act = Callable[[GenerateRequest, Context], Awaitable[None]]


def error_info(reason: str, **metadata: str) -> Message:
    info: Message = error_details_pb2.ErrorInfo(reason=reason, domain="hotgraph", metadata=metadata)
    return info


def retry_info(seconds: float) -> Message:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(int(seconds * 1000))
    result: Message = info
    return result


def details_metadata(code: grpc.StatusCode, message: str, *details: Message) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata of a google.rpc.Status."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return (("grpc-status-details-bin", status.SerializeToString()),)


async def abort(context: Context, code: grpc.StatusCode, message: str, *details: Message) -> None:
    """Ends the call with a status, rich when there are details."""
    metadata = details_metadata(code, message, *details) if details else ()
    await context.abort(code, message, metadata)


# Acts: what one Generate call does.


def whole(*texts: str, size: int = 1) -> Act:
    """Generates these texts, resumed tokens honoured."""

    async def act(request: GenerateRequest, context: Context) -> None:
        for message in scripted_model.messages(request, texts, itertools.repeat(size)):
            await context.write(message)

    return act


def broken(act_after: Act, num_messages: int, *texts: str, size: int = 1) -> Act:
    """Generates these texts, and after so many messages does something else."""

    async def act(request: GenerateRequest, context: Context) -> None:
        every = scripted_model.messages(request, texts, itertools.repeat(size))
        for message in itertools.islice(every, num_messages):
            await context.write(message)
        await act_after(request, context)

    return act


def fail(code: grpc.StatusCode, message: str = "scripted", *details: Message) -> Act:
    async def act(request: GenerateRequest, context: Context) -> None:
        await abort(context, code, message, *details)

    return act


async def end(request: GenerateRequest, context: Context) -> None:
    """Ends with OK, whatever is missing."""


async def hang(request: GenerateRequest, context: Context) -> None:
    """Says nothing until the call is cancelled."""
    await asyncio.Event().wait()


class ScriptedServer:
    """Plays one act for each Generate call, the last one again and again; answers other calls from `answers` by method name.

    An answer is a message, a list of messages (for watches, which then stay open), or a coroutine function.
    """

    def __init__(self) -> None:
        self.acts: deque[Act] = deque([whole("hello")])
        self.answers: dict[str, Any] = {}
        self.requests: list[GenerateRequest] = []
        self.unary_requests: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.num_active = 0
        self.num_cancelled = 0
        self.changed = asyncio.Condition()

    def play(self, *acts: Act) -> None:
        self.acts = deque(acts)

    async def until(self, condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
        """Waits until the condition on this server's counts holds."""
        async with asyncio.timeout(timeout_seconds), self.changed:
            await self.changed.wait_for(condition)

    async def _note(self, num_active: int, num_cancelled: int = 0) -> None:
        async with self.changed:
            self.num_active += num_active
            self.num_cancelled += num_cancelled
            self.changed.notify_all()

    async def Generate(self, request: GenerateRequest, context: Context) -> None:  # noqa: N802  # gRPC's name
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        act = self.acts.popleft() if len(self.acts) > 1 else self.acts[0]
        await self._note(1)
        try:
            await act(request, context)
        except asyncio.CancelledError:
            await self._note(0, 1)
            raise
        finally:
            await self._note(-1)

    async def answer(self, method: str, request: Any, context: Context) -> Any:
        self.unary_requests.append((method, request))
        self.metadata.append(dict(context.invocation_metadata() or ()))
        answer = self.answers[method]
        return await answer(request, context) if callable(answer) else answer

    async def watch(self, method: str, request: Any, context: Context) -> None:
        await self._note(1)
        try:
            for message in await self.answer(method, request, context):
                await context.write(message)
            await asyncio.Event().wait()
        finally:
            await self._note(-1)

    def __getattr__(self, method: str) -> Any:
        """The handlers of all other methods, for gRPC's registration of the services."""
        if not method[0].isupper():
            raise AttributeError(method)
        handle = self.watch if method.startswith("Watch") else self.answer

        async def handler(request: Any, context: Context) -> Any:
            return await handle(method, request, context)

        return handler


@asynccontextmanager
async def serving(
    server: ScriptedServer,
    address: str,
    *,
    options: Sequence[tuple[str, Any]] = (),
    credentials: grpc.ServerCredentials | None = None,
    extra: Callable[[grpc.aio.Server], None] | None = None,
) -> AsyncIterator[int]:
    """Serves it at unix:PATH or HOST:PORT; gives the port. `extra` adds other services."""
    aio_server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *options])
    servicer: Any = server
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, aio_server)
    graph_service_pb2_grpc.add_GraphServiceServicer_to_server(servicer, aio_server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(servicer, aio_server)
    if extra is not None:
        extra(aio_server)
    port = (
        aio_server.add_insecure_port(address)
        if credentials is None
        else aio_server.add_secure_port(address, credentials)
    )
    await aio_server.start()
    try:
        yield port
    finally:
        await aio_server.stop(None)


class Relay:
    """Passes bytes between a Unix socket of its own and another, until it is cut."""

    def __init__(self, path: Path, upstream: Path) -> None:
        self.target = f"unix:{path}"
        self._path = path
        self.upstream = upstream
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Relay]:
        listener = await asyncio.start_unix_server(self._accept, self._path)
        try:
            yield self
        finally:
            listener.close()
            self.cut()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Breaks every connection at once, as a killed process would."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self.upstream)
        self._writers += [writer, up_writer]
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # cut
        finally:
            sink.transport.abort()


def cut_after(relay: Relay, seen: asyncio.Queue[Any], num_events: int) -> Act:
    """Cuts the relay once the client has seen so many more events, then waits for the call to be gone."""

    async def act(request: GenerateRequest, context: Context) -> None:
        for _ in range(num_events):
            await seen.get()
        relay.cut()
        await hang(request, context)

    return act
