"""A whole daemon with the fake engine in this process, on a Unix socket, and plain stubs to call it. No client code of ours."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed
from grpc_health.v1 import health_pb2_grpc

from graphcache import Clock
from hotgraph.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    graph_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from hotgraph_server.config import ModelSettings, SchedulerSettings, ServerSettings, Settings
from hotgraph_server.daemon import BuildParts, Daemon, Parts
from hotgraph_server.engine import FakeEngine, TokenRule
from hotgraph_server.engine.token_rules import History
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.text import ByteTokenizer

PATIENCE_SECONDS = 20.0  # for what happens within milliseconds on a quiet machine


def letters(history: History) -> int:
    """A token rule: letters, never the end of text."""
    return ord("a") + len(history.completion_token_ids) % 26


@dataclass(frozen=True)
class WireError:
    """A failed call as a client of any language could read it."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None
    pushback_ms: int | None = None
    resource: tuple[str, str] | None = None
    request_id: str = ""

    @property
    def fields(self) -> list[str]:
        return sorted(self.violations)


def wire_error(error: grpc.aio.AioRpcError) -> WireError:
    """Reads the trailers; the packed status must say the same as the plain one."""
    trailers: dict[str, Any] = {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416 (dict() does not do)
    packed = trailers.get("grpc-status-details-bin")
    if packed is None:
        return WireError(error.code(), error.details() or "")
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.ResourceInfo,
            error_details_pb2.RequestInfo,
        ):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.__name__] = message
    info = found["ErrorInfo"]
    retry = found.get("RetryInfo")
    resource = found.get("ResourceInfo")
    pushback = trailers.get("grpc-retry-pushback-ms")
    return WireError(
        code=error.code(),
        message=error.details() or "",
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        violations={v.field: v.description for v in found["BadRequest"].field_violations}
        if "BadRequest" in found
        else {},
        retry_seconds=None if retry is None else retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9,
        pushback_ms=None if pushback is None else int(pushback),
        resource=None if resource is None else (resource.resource_type, resource.resource_name),
        request_id=found["RequestInfo"].request_id if "RequestInfo" in found else "",
    )


async def refused(call: Awaitable[Any]) -> WireError:
    """The error of a call that must fail."""
    try:
        answer = await asyncio.wait_for(call, PATIENCE_SECONDS)
    except grpc.aio.AioRpcError as error:
        return wire_error(error)
    raise AssertionError(f"answered instead of failing: {answer}")


async def stream_refused(call: Any) -> WireError:
    """The error of a stream that must fail, at whatever event."""

    async def drain() -> None:
        async for _ in call:
            pass

    return await refused(drain())


async def eventually(condition: Callable[[], Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Waits until the condition holds; awaits it when it is a coroutine function."""
    end = time.monotonic() + patience_seconds
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


class Caller:
    """Plain stubs on one channel, which speaks TLS when there are credentials."""

    def __init__(
        self,
        target: str,
        *,
        options: tuple[tuple[str, Any], ...] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        # A channel of its own: gRPC would share the connection with another channel to the same target.
        options = (("grpc.use_local_subchannel_pool", 1), *options)
        self.channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self.channel)
        self.graphs = graph_service_pb2_grpc.GraphServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)  # its stubs show no calls

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def status(self) -> admin_service_pb2.GetStatusResponse:
        response: admin_service_pb2.GetStatusResponse = await self.admin.GetStatus(admin_service_pb2.GetStatusRequest())
        return response

    async def check_alive(self) -> None:
        """A good request is served."""
        request = inference_service_pb2.CompleteRequest(text="still there?", max_tokens=3)
        response = await asyncio.wait_for(self.inference.Complete(request), PATIENCE_SECONDS)
        assert len(response.choices[0].token_ids) == 3

    async def is_all_free(self) -> bool:
        """Whether no request holds a slot, a block or a place in the queue."""
        status = await self.status()
        kv_cache = status.kv_cache
        return (
            status.scheduler.num_running == 0
            and status.scheduler.num_waiting == 0
            and kv_cache.num_used_blocks == 0
            and kv_cache.num_free_blocks + kv_cache.num_cached_blocks == kv_cache.num_blocks
        )


class Serving(Caller):
    """A daemon that runs in this process, and a caller of it."""

    def __init__(self, daemon: Daemon, engine: FakeEngine, run: asyncio.Task[Any]) -> None:
        super().__init__(daemon.addresses[0])
        self.daemon = daemon
        self.engine = engine
        self.run = run

    @property
    def scheduler(self) -> Scheduler:
        assert self.daemon.lifecycle.served is not None
        return self.daemon.lifecycle.served.scheduler


def settings(folder: Path, **changes: Any) -> Settings:
    """A fake model on a socket in `folder`; `changes` are sections' fields, such as server={"drain_grace_seconds": 1}."""
    server = {"listen": (f"unix:{folder}/s",), "drain_grace_seconds": 10.0, **changes.pop("server", {})}
    scheduler = {"num_slots": 8, **changes.pop("scheduler", {})}
    return Settings(
        model=ModelSettings(source="fake"),
        server=ServerSettings(**server),
        scheduler=SchedulerSettings(**scheduler),
        **changes,
    )


def builder(engine: FakeEngine) -> BuildParts:
    """Builds a daemon's parts around an engine that the test made."""

    async def build(settings: Settings, clock: Clock) -> Parts:
        return Parts(engine, ByteTokenizer(), engine.info.model_id)

    return build


@asynccontextmanager
async def serving(
    *, rule: TokenRule = letters, engine: FakeEngine | None = None, **changes: Any
) -> AsyncIterator[Serving]:
    """A daemon that serves; it is drained and stopped in the end, if the test did not."""
    folder = Path(tempfile.mkdtemp(prefix="hg"))  # short, since a socket's path is
    engine = engine or FakeEngine(rule=rule)
    daemon = Daemon(settings(folder, **changes), build=builder(engine))
    run = asyncio.create_task(daemon.run())
    try:
        await eventually(lambda: run.done() or daemon.lifecycle.served is not None)
        if run.done():
            run.result()
        async with Serving(daemon, engine, run) as served:
            yield served
    finally:
        engine.release()
        daemon.drain(0.0)
        await asyncio.wait_for(run, PATIENCE_SECONDS)
        shutil.rmtree(folder)
