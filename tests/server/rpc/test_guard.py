"""What the guard does with bytes and with errors, on a server of its own."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph.v1 import inference_service_pb2 as pb
from hotgraph.v1 import inference_service_pb2_grpc
from hotgraph.v1.generation_pb2 import ChatPrompt, TokenIds
from hotgraph_server.errors import InvalidRequestError, MalformedMessageError, SettingsError
from hotgraph_server.rpc.guard import ActiveCalls, Guard, doubled_oneofs, named_request, parse_request
from tests.integration.harness import PATIENCE_SECONDS, WireError, eventually, refused, stream_refused

CODE = grpc.StatusCode
SERVICE = "hotgraph.v1.InferenceService"
Handler = Callable[[Any, Any], Awaitable[Any]]

PROMPTS = {
    "text": pb.GenerateRequest(text="a text"),
    "token_ids": pb.GenerateRequest(token_ids=TokenIds(ids=range(300))),
    "chat": pb.GenerateRequest(chat=ChatPrompt()),
}
OTHERS = [
    b"",
    pb.GenerateRequest(max_tokens=3, request_id="x").SerializeToString(),
    b"\xba\x3e\x03abc",  # unknown field 999, bytes
    b"\xc1\x3e" + bytes(8),  # unknown field 1000, fixed64
    b"\xcd\x3e" + bytes(4),  # unknown field 1001, fixed32
    b"\xd3\x3e\x1a\x01x\xd4\x3e",  # unknown group 1002, with what would be field 3 inside
]


@given(
    kinds=st.lists(st.sampled_from(sorted(PROMPTS)), max_size=4),
    fill=st.lists(st.sampled_from(OTHERS), min_size=5, max_size=5),
)
def test_doubled_oneof_is_seen_wherever_it_stands(kinds: list[str], fill: list[bytes]) -> None:
    """Two different members are found among any other fields; one member twice is what protobuf allows."""
    data = fill[0] + b"".join(PROMPTS[kind].SerializeToString() + fill[i + 1] for i, kind in enumerate(kinds))
    message = pb.GenerateRequest.FromString(data)
    assert doubled_oneofs(message, data) == (["prompt"] if len(set(kinds)) > 1 else [])


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    """Nothing but our two errors comes out of parsing."""
    with suppress(MalformedMessageError, InvalidRequestError):
        parse_request(pb.GenerateRequest.FromString, data)


def test_request_without_an_id_gets_one() -> None:
    """The id is made where none was given, kept where one was, and not repeated where it is unusable."""
    message = pb.GenerateRequest()
    assert named_request(message) == message.request_id != ""
    assert named_request(pb.GenerateRequest(request_id="mine")) == "mine"
    assert named_request(pb.GenerateRequest(request_id="not mine")) == ""
    assert named_request(pb.TokenizeRequest()) == ""


class Servicer:
    """Handlers given by the test; the others are not implemented."""

    def __init__(self, unary: Handler, stream: Handler) -> None:
        async def complete(request: Any, context: Any) -> Any:
            return await unary(request, context)

        async def generate(request: Any, context: Any) -> None:
            await stream(request, context)

        self.Complete = complete
        self.Generate = generate

    def __getattr__(self, name: str) -> Any:
        return None


@asynccontextmanager
async def guarded(
    unary: Handler, stream: Handler, *, max_message_bytes: int = 1 << 20
) -> AsyncIterator[tuple[Any, Guard]]:
    """A stub of a server with these handlers behind a guard."""
    guard = Guard(
        [SERVICE],
        authorise=lambda method, context: None,
        admit=lambda method, context: None,
        max_message_bytes=max_message_bytes,
    )
    server = grpc.aio.server(interceptors=(guard,))
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(Servicer(unary, stream), server)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        server.add_insecure_port(f"unix:{folder}/s")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{folder}/s") as channel:
            yield inference_service_pb2_grpc.InferenceServiceStub(channel), guard
        await server.stop(None)


async def errors_of(handler: Handler) -> list[WireError]:
    """What both kinds of call make of the handler."""
    async with guarded(handler, handler) as (stub, guard):
        both = [
            await refused(stub.Complete(pb.CompleteRequest(text="secret prompt"))),
            await stream_refused(stub.Generate(pb.GenerateRequest(text="secret prompt"))),
        ]
        await asyncio.wait_for(guard.calls.wait_quiet(0.0), PATIENCE_SECONDS)
        return both


async def test_unexpected_exception_is_internal_with_an_incident(caplog: pytest.LogCaptureFixture) -> None:
    """The client gets an id and nothing else; the log has the id and the traceback."""

    async def fail(request: Any, context: Any) -> None:
        raise ValueError("/srv/secret/path of request " + request.text)

    with caplog.at_level(logging.ERROR, "hotgraph.rpc"):
        for error in await errors_of(fail):
            assert (error.code, error.reason, error.message) == (CODE.INTERNAL, "INTERNAL", "internal error")
            assert set(error.metadata) == {"incident"}
            record = next(r for r in caplog.records if error.metadata["incident"] in r.getMessage())
            assert record.exc_info is not None
            assert "secret" not in repr(error)


async def test_error_that_is_not_for_clients_is_internal(caplog: pytest.LogCaptureFixture) -> None:
    """An error that ends the process, raised in a call by mistake, does not show its text."""

    async def fail(request: Any, context: Any) -> None:
        raise SettingsError("/etc/hotgraph.toml is odd")

    for error in await errors_of(fail):
        assert (error.code, error.message) == (CODE.INTERNAL, "internal error")


async def test_cancellation_by_the_server_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC alone would leave the client waiting for ever: it gets UNAVAILABLE and may come back."""

    async def fail(request: Any, context: Any) -> None:
        raise asyncio.CancelledError

    for error in await errors_of(fail):
        assert error.code is CODE.UNAVAILABLE
        assert error.retry_seconds is not None


async def test_cancelled_inner_task_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    """The same when what a handler waits for is cancelled under it."""

    async def fail(request: Any, context: Any) -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    for error in await errors_of(fail):
        assert error.code is CODE.UNAVAILABLE


async def test_error_after_events_is_still_told() -> None:
    """A stream that fails half-way gives what it had, then the status."""

    async def unary(request: Any, context: Any) -> Any:
        return pb.CompleteResponse()

    async def stream(request: Any, context: Any) -> None:
        await context.write(pb.GenerateResponse())
        raise MalformedMessageError("half-way")

    async with guarded(unary, stream) as (stub, _):
        call = stub.Generate(pb.GenerateRequest())
        assert await call.read() == pb.GenerateResponse()
        error = await refused(call.read())
        assert (error.code, error.reason) == (CODE.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_too_large_answer_is_refused_clearly() -> None:
    """What would not fit into a message is an error that says so, not a call that never ends."""

    async def unary(request: Any, context: Any) -> Any:
        return pb.CompleteResponse(model="x" * 2000)

    async with guarded(unary, unary, max_message_bytes=1000) as (stub, _):
        error = await refused(stub.Complete(pb.CompleteRequest()))
        assert (error.code, error.reason) == (CODE.FAILED_PRECONDITION, "NOT_POSSIBLE")
        assert error.metadata["limit_bytes"] == "1000"


async def test_client_that_leaves_cancels_the_handler() -> None:
    """The handler's finally runs, and the guard counts the call out."""
    inside, outside = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, context: Any) -> None:
        inside.set()
        try:
            await asyncio.sleep(600)
        finally:
            outside.set()

    async with guarded(wait, wait) as (stub, guard):
        call = stub.Generate(pb.GenerateRequest())
        reader = asyncio.ensure_future(call.read())
        await asyncio.wait_for(inside.wait(), PATIENCE_SECONDS)
        assert guard.calls.count == 1
        call.cancel()
        await asyncio.wait_for(outside.wait(), PATIENCE_SECONDS)
        await eventually(lambda: guard.calls.count == 0)
        await asyncio.wait([reader])
        assert reader.cancelled()


async def test_quiet_is_when_no_call_has_come_for_a_while() -> None:
    """A call that comes during the pause is waited for, however short it is, and the pause begins again."""
    calls = ActiveCalls()
    quiet = asyncio.create_task(calls.wait_quiet(0.2))
    await asyncio.sleep(0.1)
    with calls.one():
        pass
    begin = time.monotonic()
    await asyncio.wait_for(quiet, PATIENCE_SECONDS)
    assert time.monotonic() - begin > 0.15
    with calls.one():
        quiet = asyncio.create_task(calls.wait_quiet(0.0))
        await asyncio.sleep(0.05)
        assert not quiet.done()
    await asyncio.wait_for(quiet, PATIENCE_SECONDS)
