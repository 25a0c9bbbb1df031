"""Channel options act on the wire. gRPC ignores an option whose name it does not know, so names alone prove nothing."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time

import grpc
import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.engine import FakeEngine
from hotgraph_server.rpc import server
from tests.integration.harness import PATIENCE_SECONDS, Caller, eventually, letters, refused, serving, stream_refused
from tests.integration.test_ends import CLIENT

CODE = grpc.StatusCode


@pytest.mark.slow
async def test_stopped_client_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is stopped, not dead, loses its streams after keepalive time and ping timeout: here 3 s."""
    for name, value in (("KEEPALIVE_TIME_MS", 2000), ("KEEPALIVE_TIMEOUT_MS", 1000), ("PING_TIMEOUT_MS", 1000)):
        monkeypatch.setattr(server, name, value)
    async with serving(engine=FakeEngine(rule=letters, step_seconds=0.1)) as served:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, served.daemon.addresses[0], stdout=asyncio.subprocess.PIPE
        )
        assert client.stdout is not None
        try:
            assert await asyncio.wait_for(client.stdout.readline(), PATIENCE_SECONDS) == b"reading\n"
            client.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            await eventually(served.is_all_free)
            assert time.monotonic() - begin < 6
        finally:
            client.send_signal(signal.SIGKILL)
            await client.wait()


async def test_burst_on_one_connection_is_served_or_refused_clearly() -> None:
    """900 calls at once on one warm connection: every one is answered or QUEUE_FULL, none CANCELLED or UNKNOWN."""
    async with serving(scheduler={"num_slots": 8, "max_waiting": 200}) as served:
        await served.check_alive()

        async def one() -> str:
            try:
                await served.inference.Complete(CompleteRequest(text="x", max_tokens=1))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        codes = await asyncio.gather(*(one() for _ in range(900)))
        assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"}
        assert codes.count("OK") >= 200
        await eventually(served.is_all_free)
        await served.check_alive()


async def test_calls_beyond_the_stream_limit_may_come_back() -> None:
    """Far more calls than one connection may hold: the library refuses some with UNAVAILABLE, never with CANCELLED."""
    limit = 256
    few_slots = {"num_slots": 8, "max_waiting": 4 * limit}
    async with serving(server={"max_connection_streams": limit}, scheduler=few_slots) as served:
        await served.check_alive()

        async def one() -> str:
            try:
                await served.inference.Complete(CompleteRequest(text="x", max_tokens=1))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        codes = await asyncio.gather(*(one() for _ in range(2 * limit)))
        assert set(codes) <= {"OK", "UNAVAILABLE"}
        assert codes.count("OK") >= limit
        await served.check_alive()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few of them changed, dropped or doubled."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(result) + 1)
        match chance.randrange(3):
            case 0 if position < len(result):
                result[position] = chance.randrange(256)
            case 1:
                del result[position : position + chance.randint(1, 8)]
            case _:
                result[position:position] = chance.randbytes(chance.randint(1, 8))
    return bytes(result)


async def test_mutated_messages_are_served_or_refused_as_the_callers_fault() -> None:
    """Whatever bytes come, the answer is OK or one of the caller's errors, and the daemon serves on."""
    chance = random.Random(5)
    good = CompleteRequest(request_id="fuzz", text="hello", max_tokens=2, num_choices=1, session_key="k")
    good.sampling.temperature = 0.5
    good.sampling.logit_bias.add(token_id=5, bias=1)
    good.stop.strings.append("zz")
    good.timeout.seconds = 5
    data = good.SerializeToString()
    async with serving() as served:
        call = served.channel.unary_unary(
            "/hotgraph.v1.InferenceService/Complete", request_serializer=bytes, response_deserializer=bytes
        )

        async def one(data: bytes) -> str:
            try:
                await call(data)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        codes = [await one(mutated(data, chance)) for _ in range(1500)]
        assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
        assert codes.count("INVALID_ARGUMENT") > 100
        assert codes.count("OK") > 30
        await eventually(served.is_all_free)
        await served.check_alive()


async def test_two_callers_do_not_disturb_each_other() -> None:
    """One caller's refused and broken calls leave another's stream whole."""
    engine = FakeEngine(rule=letters, step_seconds=0.002)
    async with serving(engine=engine) as served, Caller(served.daemon.addresses[0]) as other:
        stream = other.inference.Generate(GenerateRequest(text="x", max_tokens=200))
        for _ in range(20):
            await refused(served.inference.Complete(CompleteRequest()))
            call = served.inference.Generate(GenerateRequest(text="x", max_tokens=500), timeout=0.01)
            assert (await stream_refused(call)).code is CODE.DEADLINE_EXCEEDED
        events = [event async for event in stream]
        ids = [token_id for event in events for token_id in event.tokens.token_ids]
        assert ids == [ord("a") + n % 26 for n in range(200)]
