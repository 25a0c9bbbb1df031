"""The blocking client. What it sends and how it reads is shared with the one for asyncio: `calls.py`, `resume.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtobufMessage

from hotgraph.v1 import inference_service_pb2
from hotgraph_client import admin_types, calls, graph_types, types
from hotgraph_client.base import BaseClient
from hotgraph_client.requests import GenerationSpec
from hotgraph_client.resume import Attempt
from hotgraph_client.status import error_from_call
from hotgraph_client.sync_stream import READ_BY_THE_READER, EventStream, GenerateCall, Generation

MessageT = TypeVar("MessageT", bound=ProtobufMessage)
T = TypeVar("T")


class Client(BaseClient):
    """A connection to a daemon. Thread-safe: threads share one connection.

    Every call raises a HotgraphError when it fails. `timeout` is in seconds; None is the client's.
    """

    _channel: grpc.Channel | None = None
    _generate: Any = None  # the channel's Generate: what is called most is made once

    def _open_channel(self) -> grpc.Channel:
        with self._lock:
            self._check_open()
            if self._channel is None:
                credentials = self._config.credentials()
                options = [*self._config.options(), READ_BY_THE_READER]
                self._channel = (
                    grpc.insecure_channel(self._config.target, options)
                    if credentials is None
                    else grpc.secure_channel(self._config.target, credentials, options)
                )
                self._generate = self._channel.unary_stream(
                    calls.GENERATE_PATH,
                    request_serializer=_serialize,
                    response_deserializer=inference_service_pb2.GenerateResponse.FromString,
                )
            return self._channel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and the connection. Idempotent."""
        with self._lock:
            self._is_closed = True
            channel, self._channel = self._channel, None
        self._close_generations()
        if channel is not None:
            channel.close()

    def _unary(self, call: calls.Call[MessageT, T], timeout: float | None) -> T:
        timeout = self._timeout(timeout)
        method = self._open_channel().unary_unary(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response_type.FromString,
        )
        try:
            response = method(
                call.request,
                timeout=timeout,
                metadata=self._config.metadata(),
                wait_for_ready=self._config.wait_for_ready,
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from None
        return call.decode(response)

    def _watch(self, call: calls.Call[MessageT, T], timeout: float | None) -> EventStream[T]:
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
        return EventStream(stream, call.decode)

    def _all_pages(
        self, list_page: Callable[[str], calls.Call[MessageT, calls.Page[T]]], timeout: float | None
    ) -> tuple[T, ...]:
        page = self._unary(list_page(""), timeout)
        items = list(page.items)
        while page.next_page_token:
            page = self._unary(list_page(page.next_page_token), timeout)
            items += page.items
        return tuple(items)

    # Text and tokens.

    def generate(self, prompt: types.Prompt, **options: Unpack[types.GenerateOptions]) -> Generation:
        """Starts a generation: an iterator of Started, Tokens and Finished. Its `result()` gives the whole.

        prompt: text, token ids, or a conversation; the options are those of GenerateOptions.
        """
        spec = self._spec(prompt, **options)
        return self._start(spec)

    def _start(self, spec: GenerationSpec) -> Generation:
        generation = Generation(self._progress(spec), self._generate_opener(spec))
        with self._lock:
            self._generations.add(generation)
        return generation

    def _generate_opener(self, spec: GenerationSpec) -> Callable[[Attempt], GenerateCall]:
        def open_call(attempt: Attempt) -> GenerateCall:
            self._open_channel()
            call: Any = self._generate(
                attempt.request,
                timeout=attempt.timeout_seconds,
                metadata=self._generation_metadata(spec),
                wait_for_ready=self._config.wait_for_ready,
            )
            opened: GenerateCall = call
            return opened

        return open_call

    def complete(self, prompt: types.Prompt, **options: Unpack[types.GenerateOptions]) -> types.Completion:
        """Generates and answers once, with all of it; the options are those of GenerateOptions.

        One unary call, which gRPC sends again when the server is not reached. resume=True makes it a stream underneath,
        which goes on after a lost server.
        """
        spec = self._spec(prompt, **options)
        if spec.resume:
            with self._start(spec) as generation:
                return generation.result()
        return self._unary(calls.complete(spec), spec.timeout_seconds)

    def tokenize(
        self,
        prompt: str | Sequence[types.MessageLike],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> types.Tokenized:
        """The token ids of a text or a conversation, as `generate` would see them."""
        return self._unary(calls.tokenize(prompt, model, add_special_tokens), timeout)

    def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids; bytes that form no character read as U+FFFD."""
        return self._unary(calls.detokenize(token_ids, model, skip_special_tokens), timeout)

    def list_models(self, *, timeout: float | None = None) -> tuple[types.Model, ...]:
        """The models that can be asked for."""
        return self._all_pages(calls.list_models, timeout)

    def get_model(self, name: str = "", *, timeout: float | None = None) -> types.Model:
        """One model, by models/{id} or the id alone; the served one by default. Raises ModelNotFoundError."""
        return self._unary(calls.get_model(name), timeout)

    # The graph cache.

    def list_graphs(
        self, states: Iterable[graph_types.GraphState | str] = (), *, timeout: float | None = None
    ) -> tuple[graph_types.Graph, ...]:
        """Entries of the cache, most hits first; only those in one of the states, if any are given."""
        wanted = tuple(states)
        return self._all_pages(lambda token: calls.list_graphs(wanted, token), timeout)

    def get_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """One entry, by graphs/{id}. Raises GraphNotFoundError."""
        return self._unary(calls.get_graph(name), timeout)

    def prewarm_graphs(
        self,
        keys: Iterable[graph_types.GraphKey],
        *,
        wait_seconds: float | None = None,
        timeout: float | None = None,
    ) -> tuple[graph_types.Graph, ...]:
        """Queues captures, most wanted first. With wait_seconds (at most 60) it answers when they ended or that is over."""
        return self._unary(calls.prewarm_graphs(keys, wait_seconds), timeout)

    def pin_graph(
        self, name: str, *, lease_seconds: float | None = None, timeout: float | None = None
    ) -> graph_types.Graph:
        """Keeps a ready graph from eviction for a while (default 10 minutes). Again: renews the lease."""
        return self._unary(calls.pin_graph(name, lease_seconds), timeout)

    def unpin_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """Ends a pin. Not an error when there is none."""
        return self._unary(calls.unpin_graph(name), timeout)

    def evict_graph(self, name: str, *, timeout: float | None = None) -> graph_types.Graph:
        """Throws a graph out. Raises NotPossibleError when it is pinned or not ready."""
        return self._unary(calls.evict_graph(name), timeout)

    def get_budget(self, *, timeout: float | None = None) -> graph_types.Budget:
        """The byte budget and what is used of it."""
        return self._unary(calls.get_budget(), timeout)

    def update_budget(
        self,
        *,
        limit_bytes: int | None = None,
        stall_budget_seconds: float | None = None,
        timeout: float | None = None,
    ) -> graph_types.BudgetUpdate:
        """Changes what is given of the budget, and evicts down to it."""
        return self._unary(calls.update_budget(limit_bytes, stall_budget_seconds), timeout)

    def watch_graphs(
        self, after_sequence: int | None = None, *, timeout: float | None = None
    ) -> EventStream[graph_types.GraphEvent]:
        """Events as they happen; kept ones after a sequence number first, 0 for all. EventsGoneError: no longer kept."""
        return self._watch(calls.watch_graphs(after_sequence), timeout)

    def export_profile(
        self, max_entries: int | None = None, *, timeout: float | None = None
    ) -> graph_types.GraphProfile:
        """Which shapes were hot."""
        return self._unary(calls.export_profile(max_entries), timeout)

    def import_profile(
        self, profile: graph_types.GraphProfile, *, timeout: float | None = None
    ) -> graph_types.ProfileImport:
        """Queues captures of a profile's shapes, most valuable first."""
        return self._unary(calls.import_profile(profile), timeout)

    # The daemon.

    def get_status(self, *, timeout: float | None = None) -> admin_types.ServerStatus:
        """What the daemon does and holds right now."""
        return self._unary(calls.get_status(), timeout)

    def drain(self, *, grace_seconds: float | None = None, timeout: float | None = None) -> admin_types.DrainStatus:
        """Lets the daemon finish what runs, admit no more and end. Again: may only shorten the grace."""
        return self._unary(calls.drain(grace_seconds), timeout)

    def list_clients(self, *, timeout: float | None = None) -> tuple[admin_types.ClientInfo, ...]:
        """Who calls."""
        return self._all_pages(calls.list_clients, timeout)

    def check_health(self, service: str = "", *, timeout: float | None = None) -> admin_types.Health:
        """Of the daemon, of one service, or "hotgraph.warm". Raises NotFoundError for a service it does not know."""
        return self._unary(calls.check_health(service), timeout)

    def watch_health(self, service: str = "", *, timeout: float | None = None) -> EventStream[admin_types.Health]:
        """The health now, and again whenever it changes."""
        return self._watch(calls.watch_health(service), timeout)


def _serialize(message: ProtobufMessage) -> bytes:
    return message.SerializeToString()
