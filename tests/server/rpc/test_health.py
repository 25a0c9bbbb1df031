"""Health: fixed names, and watchers that do not disturb each other."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed
from grpc.aio import AbortError
from grpc_health.v1 import health_pb2

from hotgraph_server.rpc.health import HealthServicer
from hotgraph_server.rpc.status import DETAILS_KEY

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Context:
    """Gathers what is written."""

    def __init__(self) -> None:
        self.written: list[int] = []

    async def write(self, response: Any) -> None:
        self.written.append(response.status)


async def watching(health: HealthServicer, name: str) -> tuple[Context, asyncio.Task[None]]:
    context = Context()
    task = asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(service=name), context))  # type: ignore[arg-type]
    await settle()
    return context, task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_watchers_hear_each_change_once_though_others_leave() -> None:
    """A watcher that leaves takes nobody's news with it; what did not change is not said again."""
    health = HealthServicer(["", "a"])
    stays, staying = await watching(health, "a")
    _, leaving = await watching(health, "a")
    leaving.cancel()
    await settle()
    health.set(["a"], is_serving=True)
    await settle()
    health.set(["", "a"], is_serving=True)
    await settle()
    health.set(["a"], is_serving=False)
    await settle()
    assert stays.written == [NOT_SERVING, SERVING, NOT_SERVING]
    staying.cancel()
    await asyncio.wait([staying, leaving])


async def test_closing_says_the_last_word_and_ends_watches() -> None:
    """A watcher reads NOT_SERVING, then its call ends."""
    health = HealthServicer(["a"])
    health.set(["a"], is_serving=True)
    context, task = await watching(health, "a")
    health.close()
    await asyncio.wait_for(task, 5)
    assert context.written == [SERVING, NOT_SERVING]


async def test_unknown_service_is_not_found_with_details() -> None:
    """A check of a name that is not served tells the reason and the name."""

    class Refusing:
        async def abort(self, code: grpc.StatusCode, message: str, metadata: Any) -> None:
            raise AbortError(code, dict(metadata))

    with pytest.raises(AbortError) as caught:
        await HealthServicer(["a"]).Check(health_pb2.HealthCheckRequest(service="b"), Refusing())  # type: ignore[arg-type]
    code, metadata = caught.value.args
    assert code is grpc.StatusCode.NOT_FOUND
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(metadata[DETAILS_KEY]).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("SERVICE_NOT_FOUND", "hotgraph")


async def test_only_known_names_can_be_set() -> None:
    """A misspelt name is our mistake and is heard of."""
    with pytest.raises(KeyError):
        HealthServicer(["a"]).set(["b"], is_serving=True)
