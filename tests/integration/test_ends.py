"""How calls end before their time: cancelled, vanished, too late, refused. Slots and blocks are counted afterwards."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from hotgraph.v1 import generation_pb2
from hotgraph.v1.generation_pb2 import GraphPolicy, OutputOptions
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import EngineFailedError
from hotgraph_server.rpc.guard import STATUS_SECONDS
from hotgraph_server.rpc.inference import LATE_SECONDS
from tests.integration.harness import (
    PATIENCE_SECONDS,
    Caller,
    Serving,
    eventually,
    letters,
    refused,
    serving,
    stream_refused,
    wire_error,
)

CODE = grpc.StatusCode


def slow_engine(**options: object) -> FakeEngine:
    return FakeEngine(rule=letters, step_seconds=0.005, **options)  # type: ignore[arg-type]


async def started(served: Serving, **request: Any) -> Any:
    """A stream whose first tokens are here."""
    call: Any = served.inference.Generate(GenerateRequest(text="x", max_tokens=1000, **request))
    await call.read()
    event = await call.read()
    assert event.WhichOneof("event") == "tokens"
    return call


async def remaining(call: Any) -> list[Any]:
    """The events of a stream that was read from already, until its end or its error."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def test_cancelled_stream_frees_its_slot_and_blocks() -> None:
    """Ending the stream is the cancel: everything it held is free, and it is counted as cancelled."""
    async with serving(engine=slow_engine()) as served:
        calls = [await started(served) for _ in range(4)]
        status = await served.status()
        assert status.scheduler.num_running == 4
        assert status.kv_cache.num_used_blocks >= 4
        for call in calls:
            call.cancel()
        await eventually(served.is_all_free)
        assert (await served.status()).scheduler.num_cancelled == 4
        await served.check_alive()


async def test_cancelled_unary_call_frees_its_slot_and_blocks() -> None:
    """Complete is cancelled likewise."""
    async with serving(engine=slow_engine()) as served:
        call = served.inference.Complete(CompleteRequest(text="x", max_tokens=1000))
        await eventually(lambda: served.scheduler.status().num_running == 1)
        call.cancel()
        await eventually(served.is_all_free)
        assert (await served.status()).scheduler.num_cancelled == 1


async def test_request_cancelled_in_the_queue_leaves_it() -> None:
    """A request that never ran is forgotten, and the one behind it gets its turn."""
    async with serving(engine=slow_engine(num_slots=1), scheduler={"num_slots": 1}) as served:
        first = await started(served)
        waiting: Any = served.inference.Generate(GenerateRequest(text="y", max_tokens=5))
        await waiting.read()
        assert (await served.status()).scheduler.num_waiting == 1
        waiting.cancel()
        await eventually(lambda: served.scheduler.status().num_waiting == 0)
        first.cancel()
        await eventually(served.is_all_free)
        await served.check_alive()


CLIENT = """
import sys, grpc
from hotgraph.v1 import inference_service_pb2 as pb, inference_service_pb2_grpc as stubs
channel = grpc.insecure_channel(sys.argv[1])
calls = [stubs.InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="x", max_tokens=1000)) for _ in range(3)]
for call in calls:
    next(call), next(call)
print("reading", flush=True)
for event in calls[0]:
    pass
"""


async def test_killed_client_frees_its_slots_and_blocks() -> None:
    """A client that dies with SIGKILL in the middle of three streams leaves nothing behind."""
    async with serving(engine=slow_engine()) as served:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, served.daemon.addresses[0], stdout=asyncio.subprocess.PIPE
        )
        assert client.stdout is not None
        try:
            assert await asyncio.wait_for(client.stdout.readline(), PATIENCE_SECONDS) == b"reading\n"
            assert (await served.status()).scheduler.num_running == 3
        finally:
            client.send_signal(signal.SIGKILL)
            await client.wait()
        await eventually(served.is_all_free)
        assert (await served.status()).scheduler.num_cancelled == 3
        await served.check_alive()


async def test_deadline_of_the_call_frees_everything() -> None:
    """The client sees DEADLINE_EXCEEDED, and the request is gone from the engine."""
    async with serving(engine=slow_engine()) as served:
        call: Any = served.inference.Generate(GenerateRequest(text="x", max_tokens=1000), timeout=0.2)
        error = await stream_refused(call)
        assert error.code is CODE.DEADLINE_EXCEEDED
        await eventually(served.is_all_free)
        status = await served.status()
        assert status.scheduler.num_expired + status.scheduler.num_cancelled == 1
        await served.check_alive()


async def test_timeout_of_the_request_is_told_after_the_tokens() -> None:
    """The request's own timeout ends the stream with a reason, after what was made until then."""
    async with serving(engine=slow_engine()) as served:
        call: Any = served.inference.Generate(
            GenerateRequest(text="x", max_tokens=1000, request_id="late", timeout=Duration(nanos=200_000_000))
        )
        assert (await call.read()).WhichOneof("event") == "started"
        assert (await call.read()).WhichOneof("event") == "tokens"
        error = await refused(remaining(call))
        assert (error.code, error.reason, error.request_id) == (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "late")
        await eventually(served.is_all_free)
        assert (await served.status()).scheduler.num_expired == 1


async def test_timeout_in_the_queue_is_told() -> None:
    """A request that never got a slot in its time is DEADLINE_EXCEEDED too."""
    async with serving(engine=slow_engine(num_slots=1), scheduler={"num_slots": 1}) as served:
        first = await started(served)
        begin = time.monotonic()
        error = await refused(
            served.inference.Complete(CompleteRequest(text="y", max_tokens=5, timeout=Duration(nanos=50_000_000)))
        )
        assert (error.code, error.reason) == (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert time.monotonic() - begin < 2
        first.cancel()
        await eventually(served.is_all_free)


async def test_servers_own_limit_has_its_own_reason() -> None:
    """Without a deadline the server's limit holds, and says so; a longer one of the caller does not lift it."""
    async with serving(engine=slow_engine(), server={"max_request_seconds": 0.1}) as served:
        for timeout in (None, Duration(seconds=100)):
            error = await refused(
                served.inference.Complete(CompleteRequest(text="x", max_tokens=1000, timeout=timeout))
            )
            assert (error.code, error.reason) == (CODE.DEADLINE_EXCEEDED, "SERVER_TIME_LIMIT")
        error = await refused(
            served.inference.Complete(CompleteRequest(text="x", max_tokens=1000, timeout=Duration(nanos=50_000_000)))
        )
        assert error.reason == "DEADLINE_EXCEEDED"
        await eventually(served.is_all_free)


async def test_request_id_in_flight_is_refused_and_free_afterwards() -> None:
    """A second request of the same id is ALREADY_EXISTS; the first is unharmed, and later the id may be used again."""
    async with serving(engine=slow_engine()) as served:
        call = await started(served, request_id="twin")
        error = await refused(served.inference.Complete(CompleteRequest(text="x", request_id="twin")))
        assert (error.code, error.reason) == (CODE.ALREADY_EXISTS, "DUPLICATE_REQUEST")
        assert error.request_id == "twin"
        assert (await call.read()).WhichOneof("event") == "tokens"
        call.cancel()
        await eventually(served.is_all_free)
        again = await served.inference.Complete(CompleteRequest(text="x", request_id="twin", max_tokens=1))
        assert again.request_id == "twin"


async def test_full_queue_is_refused_with_a_time_to_come_back() -> None:
    """Beyond the queue's limit: RESOURCE_EXHAUSTED with RetryInfo and the pushback trailer; those inside are served."""
    limits = {"num_slots": 1, "max_waiting": 2}
    async with serving(engine=slow_engine(num_slots=1), scheduler=limits) as served:
        first = await started(served)
        waiting: list[Any] = [served.inference.Generate(GenerateRequest(text="y", max_tokens=2)) for _ in range(2)]
        for call in waiting:
            assert (await call.read()).WhichOneof("event") == "started"
        error = await refused(served.inference.Complete(CompleteRequest(text="z", max_tokens=1)))
        assert (error.code, error.reason) == (CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert error.retry_seconds is not None
        assert error.retry_seconds > 0
        assert error.pushback_ms is not None
        assert abs(error.pushback_ms - error.retry_seconds * 1000) <= 1
        assert (await served.status()).scheduler.num_rejected == 1
        first.cancel()
        for call in waiting:
            assert [event.WhichOneof("event") for event in await remaining(call)][-1] == "finished"
        await eventually(served.is_all_free)


async def test_required_graph_that_is_not_ready_is_refused_with_an_estimate() -> None:
    """GRAPH_MODE_REQUIRE on a cold cache: UNAVAILABLE, GRAPH_NOT_READY, RetryInfo; once captured it is served by graphs."""
    async with serving() as served:
        policy = GraphPolicy(mode=generation_pb2.GRAPH_MODE_REQUIRE)
        request = CompleteRequest(text="hello", max_tokens=4, graph_policy=policy)
        error = await refused(served.inference.Complete(request))
        assert (error.code, error.reason) == (CODE.UNAVAILABLE, "GRAPH_NOT_READY")
        assert error.retry_seconds is not None

        async def is_served() -> bool:
            try:
                response = await served.inference.Complete(request)
            except grpc.aio.AioRpcError as error:
                if wire_error(error).reason != "GRAPH_NOT_READY":
                    raise
                return False
            return bool(response.receipt.num_eager_steps == 0)

        await eventually(is_served)


async def test_row_with_wrong_numbers_ends_its_request_alone() -> None:
    """Logits that are not finite are our mistake: INTERNAL with an incident, and the neighbours go on."""
    engine = FakeEngine(rule=letters)
    engine.fail_rows(3, [0])
    async with serving(engine=engine) as served:
        error = await refused(served.inference.Complete(CompleteRequest(text="x", max_tokens=10)))
        assert (error.code, error.reason, error.message) == (CODE.INTERNAL, "INTERNAL", "internal error")
        assert len(error.metadata["incident"]) == 32
        await served.check_alive()
        await eventually(served.is_all_free)


@pytest.mark.parametrize("reason", ["ENGINE_FAILED", "DRAINING"])
async def test_calls_that_come_at_the_end_hear_why(reason: str) -> None:
    """Sixty calls at once in the moment in which the daemon ends hear why: none is CANCELLED, as if its caller had left."""
    async with serving(engine=slow_engine()) as served:
        running = [asyncio.create_task(refused(remaining(await started(served)))) for _ in range(4)]
        request = CompleteRequest(text="x", max_tokens=3)
        calls = [asyncio.create_task(refused(served.inference.Complete(request))) for _ in range(60)]
        await asyncio.sleep(0)  # they are on their way, and nobody has taken one yet
        if reason == "ENGINE_FAILED":
            served.daemon._on_failure(EngineFailedError("the engine failed", retry_after_seconds=1.0))
            served.scheduler.end_all(EngineFailedError("the engine failed", retry_after_seconds=1.0))
        else:
            served.daemon.drain(0.0)
        errors = await asyncio.gather(*running, *calls)
        assert {(error.code, error.reason) for error in errors} == {(CODE.UNAVAILABLE, reason)}
        assert all(error.retry_seconds and error.pushback_ms for error in errors)


async def test_reader_that_does_not_read_ends_at_the_deadline() -> None:
    """A client whose window is full holds no slot, and its call only a few seconds beyond the deadline."""
    async with serving(server={"max_request_seconds": 0.5}) as served:
        window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
        async with Caller(served.daemon.addresses[0], options=window) as reader:
            output = OutputOptions(logprobs=20)  # 400 bytes a token: more than the window holds
            call = reader.inference.Generate(GenerateRequest(text="x", max_tokens=900, num_choices=8, output=output))
            await call.read()
            await eventually(served.is_all_free)
            assert served.daemon._rpc._calls.count == 1, "the writer is not blocked: the test tests nothing"
            begin = time.monotonic()
            await eventually(lambda: served.daemon._rpc._calls.count == 0)
            assert time.monotonic() - begin < LATE_SECONDS + STATUS_SECONDS + 2
            await served.check_alive()
