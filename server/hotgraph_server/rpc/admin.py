"""AdminService: the daemon's status, its end, and its callers. It answers in every state."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any, Final

import grpc.aio

from hotgraph.v1 import admin_service_pb2, admin_service_pb2_grpc
from hotgraph_server.rpc import validate
from hotgraph_server.rpc.clients import ClientRegistry
from hotgraph_server.rpc.lifecycle import Lifecycle
from hotgraph_server.rpc.paging import decode_page_token, encode_page_token
from hotgraph_server.rpc.wire import status
from hotgraph_server.rpc.wire.common import from_duration, to_timestamp

Context = grpc.aio.ServicerContext[Any, Any]
Drain = Callable[[float | None], float]

PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
MAX_GRACE_SECONDS: Final = 315_576_000_000  # of google.protobuf.Duration; the server's own limit is lower


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """`drain` begins a drain with a grace in seconds, None for the server's own; it returns the seconds until the end.

    It raises NotPossibleError when there is nothing to drain yet.
    """

    def __init__(self, lifecycle: Lifecycle, clients: ClientRegistry, drain: Drain) -> None:
        self._lifecycle = lifecycle
        self._clients = clients
        self._drain = drain
        self._start_time = time.time()
        self._version = _version()

    async def GetStatus(  # noqa: N802  (the contract's name, as all below)
        self, request: admin_service_pb2.GetStatusRequest, context: Context
    ) -> admin_service_pb2.GetStatusResponse:
        response = admin_service_pb2.GetStatusResponse(
            version=self._version,
            state=status.STATES[self._lifecycle.state],
            start_time=to_timestamp(self._start_time),
        )
        served = self._lifecycle.served
        if served is not None:
            scheduler = served.scheduler.status()
            response.model = served.model_id
            response.scheduler.CopyFrom(status.scheduler_message(scheduler))
            response.kv_cache.CopyFrom(status.kv_cache_message(scheduler.kv_cache))
            response.graph_cache.CopyFrom(status.graph_cache_message(served.engine.graphs.stats()))
        return response

    async def Drain(  # noqa: N802
        self, request: admin_service_pb2.DrainRequest, context: Context
    ) -> admin_service_pb2.DrainResponse:
        grace_seconds: float | None = None
        if request.HasField("grace"):
            found = validate.Violations()
            if found.well_formed_duration("grace", request.grace):
                found.in_range("grace", from_duration(request.grace), 0, MAX_GRACE_SECONDS)
            found.raise_any()
            grace_seconds = from_duration(request.grace)
        remaining_seconds = self._drain(grace_seconds)
        served = self._lifecycle.served
        return admin_service_pb2.DrainResponse(
            state=status.STATES[self._lifecycle.state],
            num_requests=0 if served is None else served.scheduler.num_requests,
            deadline=to_timestamp(time.time() + remaining_seconds),
        )

    async def ListClients(  # noqa: N802
        self, request: admin_service_pb2.ListClientsRequest, context: Context
    ) -> admin_service_pb2.ListClientsResponse:
        page_size = validate.check_page_size(request.page_size, default=PAGE_SIZE, maximum=MAX_PAGE_SIZE)
        after = decode_page_token(request.page_token, (str,))
        clients = self._clients.by_name()
        rest = clients if after is None else [client for client in clients if (client.name,) > after]
        page = rest[:page_size]
        return admin_service_pb2.ListClientsResponse(
            clients=[status.client_message(client) for client in page],
            next_page_token=encode_page_token((page[-1].name,)) if len(rest) > len(page) else "",
        )


def _version() -> str:
    try:
        return importlib.metadata.version("hotgraph")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "0+unknown"
