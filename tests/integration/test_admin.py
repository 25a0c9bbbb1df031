"""AdminService, health and reflection over the wire, in each state of the daemon."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from graphcache import Clock
from hotgraph.v1 import admin_service_pb2, graph_service_pb2, inference_service_pb2
from hotgraph.v1.admin_service_pb2 import DrainRequest, ListClientsRequest
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import Settings
from hotgraph_server.daemon import Daemon, Parts
from hotgraph_server.engine import FakeEngine
from hotgraph_server.rpc.reflection import METHOD, REFLECTION_SERVICES, V1_SERVICE
from hotgraph_server.rpc.server import OUR_SERVICES
from hotgraph_server.text import ByteTokenizer
from tests.integration.harness import (
    PATIENCE_SECONDS,
    Caller,
    Serving,
    eventually,
    letters,
    refused,
    serving,
    settings,
    stream_refused,
)

CODE = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", *OUR_SERVICES)


async def health(caller: Caller, name: str) -> int:
    response = await caller.health.Check(health_pb2.HealthCheckRequest(service=name))
    status: int = response.status
    return status


async def next_health(watch: Any) -> int:
    response = await asyncio.wait_for(watch.read(), PATIENCE_SECONDS)
    status: int = response.status
    return status


async def test_life_is_visible_from_loading_to_the_end() -> None:
    """While loading: health NOT_SERVING, calls UNAVAILABLE LOADING, status answers. Then SERVING. Draining: as loading was."""
    may_load = asyncio.Event()

    async def build(settings: Settings, clock: Clock) -> Parts:
        await may_load.wait()
        return Parts(FakeEngine(rule=letters, step_seconds=0.005), ByteTokenizer(), "slow-to-load")

    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        daemon = Daemon(settings(Path(folder)), build=build)
        run = asyncio.create_task(daemon.run())
        await eventually(lambda: daemon.addresses)
        async with Caller(daemon.addresses[0]) as caller:
            watch = caller.health.Watch(health_pb2.HealthCheckRequest())
            other_watch = caller.health.Watch(health_pb2.HealthCheckRequest())
            assert await next_health(watch) == NOT_SERVING
            assert await next_health(other_watch) == NOT_SERVING
            other_watch.cancel()  # a watcher that leaves must not take the others' news with it
            for name in (*NAMES, "hotgraph.warm"):
                assert await health(caller, name) == NOT_SERVING
            for call in (
                caller.inference.Complete(CompleteRequest(text="x")),
                caller.inference.GetModel(inference_service_pb2.GetModelRequest()),
                caller.graphs.ListGraphs(graph_service_pb2.ListGraphsRequest()),
            ):
                error = await refused(call)
                assert (error.code, error.reason) == (CODE.UNAVAILABLE, "LOADING")
                assert error.retry_seconds is not None
                assert error.pushback_ms is not None
            status = await caller.status()
            assert status.state == admin_service_pb2.DAEMON_STATE_STARTING
            assert status.model == ""
            assert not status.HasField("scheduler")

            may_load.set()
            assert await next_health(watch) == SERVING
            for name in NAMES:
                assert await health(caller, name) == SERVING
            status = await caller.status()
            assert (status.state, status.model) == (admin_service_pb2.DAEMON_STATE_SERVING, "slow-to-load")
            assert status.scheduler.num_slots == 8

            stream: Any = caller.inference.Generate(GenerateRequest(text="x", max_tokens=60))
            assert (await stream.read()).WhichOneof("event") == "started"
            answer = await caller.admin.Drain(DrainRequest())
            assert answer.state == admin_service_pb2.DAEMON_STATE_DRAINING
            assert answer.num_requests == 1
            assert await next_health(watch) == NOT_SERVING
            assert await health(caller, "hotgraph.v1.InferenceService") == NOT_SERVING
            error = await refused(caller.inference.Complete(CompleteRequest(text="x")))
            assert (error.code, error.reason) == (CODE.UNAVAILABLE, "DRAINING")
            assert error.retry_seconds is not None
            assert (await caller.status()).state == admin_service_pb2.DAEMON_STATE_DRAINING
            kinds = []
            while (event := await stream.read()) is not grpc.aio.EOF:
                kinds.append(event.WhichOneof("event"))
            assert kinds[-1] == "finished"
            assert await asyncio.wait_for(run, PATIENCE_SECONDS) == 0


async def test_drain_may_only_shorten_the_grace() -> None:
    """A second Drain with a longer grace changes nothing; with a shorter one the end comes sooner, with DRAINING."""
    engine = FakeEngine(rule=letters, step_seconds=0.01)
    async with serving(engine=engine, server={"drain_grace_seconds": 10.0}) as served:
        stream: Any = served.inference.Generate(GenerateRequest(text="x", max_tokens=1000))
        await stream.read()
        first = await served.admin.Drain(DrainRequest(grace=Duration(seconds=5)))
        longer = await served.admin.Drain(DrainRequest(grace=Duration(seconds=100)))
        assert longer.deadline.ToMilliseconds() == pytest.approx(first.deadline.ToMilliseconds(), abs=50)
        shorter = await served.admin.Drain(DrainRequest(grace=Duration(nanos=50_000_000)))
        assert shorter.deadline.ToMilliseconds() < first.deadline.ToMilliseconds() - 4000

        async def read_on() -> None:
            while await stream.read() is not grpc.aio.EOF:
                pass

        error = await refused(read_on())
        assert (error.code, error.reason) == (CODE.UNAVAILABLE, "DRAINING")
        assert await asyncio.wait_for(served.run, PATIENCE_SECONDS) == 0


async def test_drain_under_load_loses_nothing() -> None:
    """Every stream accepted before the drain ends with its last event; every call after it is refused with DRAINING."""
    engine = FakeEngine(rule=letters, step_seconds=0.002)
    async with serving(engine=engine, scheduler={"num_slots": 8, "max_waiting": 200}) as served:

        async def one(number: int) -> str | None:
            call = served.inference.Generate(GenerateRequest(text=f"{number}", max_tokens=10))
            return [event.WhichOneof("event") async for event in call][-1]

        async def is_all_in() -> bool:
            return served.scheduler.status().num_requests == 50

        streams = [asyncio.create_task(one(number)) for number in range(50)]
        await eventually(is_all_in)
        served.daemon.drain()
        errors = await asyncio.gather(
            *(refused(served.inference.Complete(CompleteRequest(text="late"))) for _ in range(20))
        )
        assert {(error.code, error.reason) for error in errors} == {(CODE.UNAVAILABLE, "DRAINING")}
        assert await asyncio.gather(*streams) == ["finished"] * 50
        assert await asyncio.wait_for(served.run, PATIENCE_SECONDS) == 0


async def test_health_of_an_unknown_name() -> None:
    """Check says NOT_FOUND; Watch says SERVICE_UNKNOWN and stays."""
    async with serving() as served:
        error = await refused(served.health.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert error.code is CODE.NOT_FOUND
        watch = served.health.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert await next_health(watch) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_warm_is_told_once_nothing_waits_for_capture() -> None:
    """hotgraph.warm turns SERVING after the captures queued at the start."""
    async with serving() as served:
        watch = served.health.Watch(health_pb2.HealthCheckRequest(service="hotgraph.warm"))
        status = await next_health(watch)
        assert status == SERVING or await next_health(watch) == SERVING
        watch.cancel()


async def test_clients_are_listed_with_their_counts() -> None:
    """Callers are told apart by their declared id, else by their connection; pages show each once."""
    async with serving() as served:
        for name in ("alpha", "beta", "gamma"):
            await served.inference.Complete(CompleteRequest(text="x", max_tokens=4), metadata=(("x-client-id", name),))
        clients = list((await served.admin.ListClients(ListClientsRequest())).clients)
        alpha = next(client for client in clients if client.name == "clients/alpha")
        assert (alpha.num_requests, alpha.num_active_requests) == (1, 0)
        assert (alpha.num_prompt_tokens, alpha.num_completion_tokens) == (2, 4)
        assert alpha.peer.startswith("unix:")
        assert alpha.user_agent.startswith("grpc-python-asyncio/")
        assert alpha.first_seen_time.ToNanoseconds() <= alpha.last_seen_time.ToNanoseconds()
        assert len(clients) == 4  # and the one who asks
        names, token = [], ""
        for _ in range(4):
            page = await served.admin.ListClients(ListClientsRequest(page_size=1, page_token=token))
            names += [client.name for client in page.clients]
            token = page.next_page_token
        assert token == ""
        assert names == sorted(client.name for client in clients)


async def test_active_requests_are_counted_while_they_run() -> None:
    """A running stream counts as active, and no more once it was cancelled."""
    async with serving(engine=FakeEngine(rule=letters, step_seconds=0.005)) as served:
        stream: Any = served.inference.Generate(
            GenerateRequest(text="x", max_tokens=1000), metadata=(("x-client-id", "runner"),)
        )
        await stream.read()

        async def num_active() -> int:
            clients = (await served.admin.ListClients(ListClientsRequest())).clients
            return next(client.num_active_requests for client in clients if client.name == "clients/runner")

        assert await num_active() == 1
        stream.cancel()

        async def is_none_active() -> bool:
            return await num_active() == 0

        await eventually(is_none_active)


def reflect(served: Serving, request: reflection_pb2.ServerReflectionRequest) -> Any:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub
    return stub(served.channel).ServerReflectionInfo(iter([request]))


async def test_reflection_lists_and_describes_every_service() -> None:
    """The services are our three, health and reflection itself, and their files can be had."""
    async with serving() as served:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = [response async for response in reflect(served, request)]
        names = {service.name for service in answer.list_services_response.service}
        assert names == {*OUR_SERVICES, "grpc.health.v1.Health", *REFLECTION_SERVICES}
        for name in OUR_SERVICES:
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            [answer] = [response async for response in reflect(served, request)]
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert any(service.name == name.rpartition(".")[2] for file in files for service in file.service)


async def test_reflection_can_be_switched_off() -> None:
    """With reflection=false the service is not there, in neither version."""
    async with serving(server={"reflection": False}) as served:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        error = await stream_refused(reflect(served, request))
        assert error.code is CODE.UNIMPLEMENTED
        newer: Any = served.channel.stream_stream(f"/{V1_SERVICE}/{METHOD}")
        error = await stream_refused(newer(iter([request.SerializeToString()])))
        assert error.code is CODE.UNIMPLEMENTED


async def test_unix_and_tcp_serve_the_same_daemon() -> None:
    """Both listeners answer; the port that was chosen is told."""
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        listen = (f"unix:{folder}/s", "127.0.0.1:0", "[::1]:0")
        async with serving(server={"listen": listen}) as served:
            unix, tcp, tcp6 = served.daemon.addresses
            assert unix == f"unix:{folder}/s"
            assert int(tcp.rpartition(":")[2]) > 0
            for address in (unix, tcp, tcp6):
                async with Caller(address) as caller:
                    await caller.check_alive()
                    assert await health(caller, "") == SERVING
            clients = (await served.admin.ListClients(ListClientsRequest())).clients
            assert {client.peer.partition(":")[0] for client in clients} >= {"unix", "ipv4", "ipv6"}


async def test_engine_failure_ends_everything_with_a_reason() -> None:
    """Streams end with ENGINE_FAILED and RetryInfo, health is NOT_SERVING, and the exit status asks for a restart."""
    engine = FakeEngine(rule=letters, step_seconds=0.005)
    engine.fail_step(8)
    async with serving(engine=engine) as served:
        watch = served.health.Watch(health_pb2.HealthCheckRequest())
        assert await next_health(watch) == SERVING
        error = await stream_refused(served.inference.Generate(GenerateRequest(text="x", max_tokens=100)))
        assert (error.code, error.reason, error.message) == (CODE.UNAVAILABLE, "ENGINE_FAILED", "the engine failed")
        assert error.retry_seconds is not None
        assert await next_health(watch) == NOT_SERVING
        assert await asyncio.wait_for(served.run, PATIENCE_SECONDS) == 70
