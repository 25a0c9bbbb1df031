"""grpc.health.v1: who is ready for what. It is told the states and keeps no opinion.

The servicer of the grpcio package forgets all watchers of a name when the first of them leaves, so this one is ours; the
messages are the package's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hotgraph_server.errors import ServiceNotFoundError
from hotgraph_server.rpc.status import status_of

Context = grpc.aio.ServicerContext[Any, Any]

OVERALL: Final = ""
WARM: Final = "hotgraph.warm"  # what was queued for capture at the start is captured

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check and Watch over a fixed set of names. Event loop's thread only."""

    def __init__(self, names: Iterable[str]) -> None:
        """All names start as NOT_SERVING."""
        self._statuses: dict[str, int] = dict.fromkeys(names, NOT_SERVING)
        self._changed = asyncio.Event()
        self._is_closed = False

    def set(self, names: Iterable[str], *, is_serving: bool) -> None:
        """Raises KeyError for a name that is not of the set."""
        for name in names:
            if name not in self._statuses:
                raise KeyError(name)
            self._statuses[name] = SERVING if is_serving else NOT_SERVING
        self._wake()

    def close(self) -> None:
        """Everything is NOT_SERVING, and the watchers' calls end."""
        self._is_closed = True
        self.set(list(self._statuses), is_serving=False)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802  (the contract's name)
        status = self._statuses.get(request.service)
        if status is None:
            refusal = status_of(ServiceNotFoundError(request.service))
            await context.abort(refusal.code, refusal.message, refusal.trailing_metadata)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        last: int | None = None
        while True:
            changed = self._changed  # before the look, so that no change is missed
            status = self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            elif self._is_closed:
                return
            else:
                await changed.wait()
