"""The client for asyncio. What it sends and how it reads is shared with the blocking one: `calls.py`, `resume.py`."""

# ruff: noqa: ASYNC109  # a timeout here is the deadline of the call, which the server is told; asyncio.timeout is not

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtobufMessage

from hotgraph.v1 import inference_service_pb2
from hotgraph_client import admin_types, calls, graph_types, types
from hotgraph_client.base import BaseClient
from hotgraph_client.errors import CancelledRequestError
from hotgraph_client.requests import GenerationSpec
from hotgraph_client.resume import Attempt
from hotgraph_client.status import error_from_call
from hotgraph_client.stream import AsyncEventStream, AsyncGeneration, GenerateCall, is_task_cancelled

MessageT = TypeVar("MessageT", bound=ProtobufMessage)
T = TypeVar("T")


class AsyncClient(BaseClient):
    """A connection to a daemon, for one event loop: the one it is first used in.

    Every call raises a HotgraphError when it fails. `timeout` is in seconds; None is the client's.
    """

    _channel: grpc.aio.Channel | None = None

    def _open_channel(self) -> grpc.aio.Channel:
        self._check_open()
        if self._channel is None:
            credentials = self._config.credentials()
            self._channel = (
                grpc.aio.insecure_channel(self._config.target, self._config.options())
                if credentials is None
                else grpc.aio.secure_channel(self._config.target, credentials, self._config.options())
            )
        return self._channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call and the connection. Idempotent."""
        self._is_closed = True
        channel, self._channel = self._channel, None
        self._close_generations()
        if channel is not None:
            await channel.close()

    async def _unary(self, call: calls.Call[MessageT, T], timeout: float | None) -> T:
        timeout = self._timeout(timeout)
        method = self._open_channel().unary_unary(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response_type.FromString,
        )
        try:
            response = await method(
                call.request,
                timeout=timeout,
                metadata=self._config.metadata(),
                wait_for_ready=self._config.wait_for_ready,
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from None
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            raise CancelledRequestError("the client was closed") from None
        return call.decode(response)

    def _watch(self, call: calls.Call[MessageT, T], timeout: float | None) -> AsyncEventStream[T]:
        method = self._open_channel().unary_stream(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response_type.FromString,
        )
        stream: Any = method(
            call.request,
            timeout=timeout,
            metadata=self._config.metadata(),
            wait_for_ready=self._config.wait_for_ready,
        )
        return AsyncEventStream(stream, call.decode)

    async def _all_pages(
        self, list_page: Callable[[str], calls.Call[MessageT, calls.Page[T]]], timeout: float | None
    ) -> tuple[T, ...]:
        page = await self._unary(list_page(""), timeout)
        items = list(page.items)
        while page.next_page_token:
            page = await self._unary(list_page(page.next_page_token), timeout)
            items += page.items
        return tuple(items)

    # Text and tokens.

    def generate(self, prompt: types.Prompt, **options: Unpack[types.GenerateOptions]) -> AsyncGeneration:
        """Starts a generation: an async iterator of Started, Tokens and Finished. Its `result()` gives the whole.

        prompt: text, token ids, or a conversation; the options are those of GenerateOptions. Needs a running event loop.
        """
        spec = self._spec(prompt, **options)
        asyncio.get_running_loop()  # raises RuntimeError without one
        return self._start(spec)

    def _start(self, spec: GenerationSpec) -> AsyncGeneration:
        generation = AsyncGeneration(self._progress(spec), self._generate_opener(spec))
        with self._lock:
            self._generations.add(generation)
        return generation

    def _generate_opener(self, spec: GenerationSpec) -> Callable[[Attempt], GenerateCall]:
        def open_call(attempt: Attempt) -> GenerateCall:
            method = self._open_channel().unary_stream(
                calls.GENERATE_PATH,
                request_serializer=_serialize,
                response_deserializer=inference_service_pb2.GenerateResponse.FromString,
            )
            call: Any = method(
                attempt.request,
                timeout=attempt.timeout_seconds,
                metadata=self._generation_metadata(spec),
                wait_for_ready=self._config.wait_for_ready,
            )
            opened: GenerateCall = call
            return opened

        return open_call

    async def complete(self, prompt: types.Prompt, **options: Unpack[types.GenerateOptions]) -> types.Completion:
        """Generates and answers once, with all of it; the options are those of GenerateOptions.

        One unary call, which gRPC sends again when the server is not reached. resume=True makes it a stream underneath,
        which goes on after a lost server.
        """
        spec = self._spec(prompt, **options)
        if spec.resume:
            async with self._start(spec) as generation:
                return await generation.result()
        return await self._unary(calls.complete(spec), spec.timeout_seconds)

    async def tokenize(
        self,
        prompt: str | Sequence[types.MessageLike],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> types.Tokenized:
        """The token ids of a text or a conversation, as `generate` would see them."""
        return await self._unary(calls.tokenize(prompt, model, add_special_tokens), timeout)

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids; bytes that form no character read as U+FFFD."""
        return await self._unary(calls.detokenize(token_ids, model, skip_special_tokens), timeout)

    async def list_models(self, *, timeout: float | None = None) -> tuple[types.Model, ...]:
        """The models that can be asked for."""
        return await self._all_pages(calls.list_models, timeout)

    async def get_model(self, name: str = "", *, timeout: float | None = None) -> types.Model:
        """One model, by models/{id} or the id alone; the served one by default. Raises ModelNotFoundError."""
        return await self._unary(calls.get_model(name), timeout)

    # The graph cache.

    async def list_graphs(
        self, states: Iterable[graph_types.GraphState | str] = (), *, timeout: float | None = None
    ) -> tuple[graph_types.Graph, ...]:
        """Entries of the cache, most hits first; only those in one of the states, if any are given."""
        wanted = tuple(states)
        return await self._all_pages(lambda token: calls.list_graphs(wanted, token), timeout)

    async def get_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """One entry, by graphs/{id}. Raises GraphNotFoundError."""
        return await self._unary(calls.get_graph(name), timeout)

    async def prewarm_graphs(
        self,
        keys: Iterable[graph_types.GraphKey],
        *,
        wait_seconds: float | None = None,
        timeout: float | None = None,
    ) -> tuple[graph_types.Graph, ...]:
        """Queues captures, most wanted first. With wait_seconds (at most 60) it answers when they ended or that is over."""
        return await self._unary(calls.prewarm_graphs(keys, wait_seconds), timeout)

    async def pin_graph(
        self, name: str, *, lease_seconds: float | None = None, timeout: float | None = None
    ) -> graph_types.Graph:
        """Keeps a ready graph from eviction for a while (default 10 minutes). Again: renews the lease."""
        return await self._unary(calls.pin_graph(name, lease_seconds), timeout)

    async def unpin_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """Ends a pin. Not an error when there is none."""
        return await self._unary(calls.unpin_graph(name), timeout)

    async def evict_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """Throws a graph out. Raises NotPossibleError when it is pinned or not ready."""
        return await self._unary(calls.evict_graph(name), timeout)

    async def get_budget(self, *, timeout: float | None = None) -> graph_types.Budget:
        """The byte budget and what is used of it."""
        return await self._unary(calls.get_budget(), timeout)

    async def update_budget(
        self,
        *,
        limit_bytes: int | None = None,
        stall_budget_seconds: float | None = None,
        timeout: float | None = None,
    ) -> graph_types.BudgetUpdate:
        """Changes what is given of the budget, and evicts down to it."""
        return await self._unary(calls.update_budget(limit_bytes, stall_budget_seconds), timeout)

    def watch_graphs(
        self, after_sequence: int | None = None, *, timeout: float | None = None
    ) -> AsyncEventStream[graph_types.GraphEvent]:
        """Events as they happen; kept ones after a sequence number first, 0 for all. EventsGoneError: no longer kept."""
        return self._watch(calls.watch_graphs(after_sequence), timeout)

    async def export_profile(
        self, max_entries: int | None = None, *, timeout: float | None = None
    ) -> graph_types.GraphProfile:
        """Which shapes were hot."""
        return await self._unary(calls.export_profile(max_entries), timeout)

    async def import_profile(
        self, profile: graph_types.GraphProfile, *, timeout: float | None = None
    ) -> graph_types.ProfileImport:
        """Queues captures of a profile's shapes, most valuable first."""
        return await self._unary(calls.import_profile(profile), timeout)

    # The daemon.

    async def get_status(self, *, timeout: float | None = None) -> admin_types.ServerStatus:
        """What the daemon does and holds right now."""
        return await self._unary(calls.get_status(), timeout)

    async def drain(
        self, *, grace_seconds: float | None = None, timeout: float | None = None
    ) -> admin_types.DrainStatus:
        """Lets the daemon finish what runs, admit no more and end. Again: may only shorten the grace."""
        return await self._unary(calls.drain(grace_seconds), timeout)

    async def list_clients(self, *, timeout: float | None = None) -> tuple[admin_types.ClientInfo, ...]:
        """Who calls."""
        return await self._all_pages(calls.list_clients, timeout)

    async def check_health(self, service: str = "", *, timeout: float | None = None) -> admin_types.Health:
        """Of the daemon, of one service, or "hotgraph.warm". Raises NotFoundError for a service it does not know."""
        return await self._unary(calls.check_health(service), timeout)

    def watch_health(self, service: str = "", *, timeout: float | None = None) -> AsyncEventStream[admin_types.Health]:
        """The health now, and again whenever it changes."""
        return self._watch(calls.watch_health(service), timeout)


def _serialize(message: ProtobufMessage) -> bytes:
    return message.SerializeToString()
