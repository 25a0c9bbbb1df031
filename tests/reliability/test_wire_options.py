"""Every channel option of the server, provoked on the wire, beside a server without it: gRPC ignores names it does not know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import grpc
import h2.errors
import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest, DetokenizeRequest, GetModelRequest
from hotgraph_server.config import ServerSettings
from hotgraph_server.rpc import server
from tests.integration.harness import Caller, Serving, eventually, refused, serving, wire_error
from tests.reliability.wire import Wire, dial, wire

CHECK: Final = "/grpc.health.v1.Health/Check"
COMPLETE: Final = "/hotgraph.v1.InferenceService/Complete"
TCP: Final = {"listen": ("127.0.0.1:0",)}
UNCHANGED = server.channel_options
MAX_STREAMS: Final = ServerSettings().max_connection_streams

# The daemon under test runs in this process: what is shown here is that an option acts, not how fast.


@asynccontextmanager
async def with_options(
    monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, int | None], **more: Any
) -> AsyncIterator[Serving]:
    """A daemon on TCP with some options changed; None leaves an option out."""

    def options(settings: ServerSettings) -> list[tuple[str, int]]:
        found: dict[str, int | None] = dict(UNCHANGED(settings))
        assert set(changes) <= set(found), "a change of an option that the server does not set"
        return [(name, value) for name, value in {**found, **changes}.items() if value is not None]

    monkeypatch.setattr(server, "channel_options", options)
    async with serving(server={**TCP, "drain_grace_seconds": 0.0}, **more) as served:
        yield served


async def closes_within(connection: Wire, seconds: float) -> bool:
    """Whether the daemon closes the connection in this time."""
    end = time.monotonic() + seconds
    while not connection.is_closed and time.monotonic() < end:  # noqa: ASYNC110  (the connection tells nobody)
        await asyncio.sleep(0.02)
    return connection.is_closed


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_concurrent_streams(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """The limit is announced, and streams beyond it are refused with REFUSED_STREAM; without the option there is none."""
    changes = {} if is_set else {"grpc.max_concurrent_streams": None}
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        if not is_set:
            assert connection.max_streams > 1_000_000
            return
        assert connection.max_streams == MAX_STREAMS
        connection.h2.remote_settings.max_concurrent_streams = 1 << 20  # h2 would obey it
        connection.h2.remote_settings.acknowledge()
        streams = [connection.call(COMPLETE, None) for _ in range(MAX_STREAMS + 50)]
        await eventually(lambda: len(connection.reset_codes) >= 50)
        assert set(connection.reset_codes.values()) == {int(h2.errors.ErrorCodes.REFUSED_STREAM)}
        assert set(connection.reset_codes) == set(streams[MAX_STREAMS:])
        await served.check_alive()


@pytest.mark.parametrize("is_set", [True, False])
async def test_handshake_timeout(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """A connection that says nothing is closed when the time is over; without the option it stays for two minutes."""
    name = "grpc.server_handshake_timeout_ms"
    async with with_options(monkeypatch, {name: 500 if is_set else None}) as served:
        reader, writer = await dial(served.daemon.addresses[0])
        begin = time.monotonic()
        try:
            async with asyncio.timeout(2.5):
                while await reader.read(1024):
                    pass
            assert is_set
            assert time.monotonic() - begin >= 0.4
        except TimeoutError:
            assert not is_set
        finally:
            writer.close()


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_connections(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """Connections beyond the limit are closed at once, the others serve; without the option all stay."""
    changes = {"grpc.max_allowed_incoming_connections": 10 if is_set else None}
    async with with_options(monkeypatch, changes) as served, AsyncExitStack() as stack:
        await served.check_alive()  # the caller's own connection is one of the ten
        connections = [await stack.enter_async_context(wire(served.daemon.addresses[0])) for _ in range(20)]
        await asyncio.sleep(0.5)
        assert sum(not connection.is_closed for connection in connections) == (9 if is_set else 20)
        await served.check_alive()


KEEPALIVE: Final = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 500,
    "grpc.http2.ping_timeout_ms": 500,
}


@pytest.mark.parametrize(
    ("without", "is_noticed"),
    [
        (None, True),
        pytest.param("grpc.keepalive_time_ms", False, marks=pytest.mark.soak),
        ("grpc.http2.ping_timeout_ms", False),
        pytest.param("grpc.keepalive_permit_without_calls", False, marks=pytest.mark.soak),
    ],
)
async def test_silent_peer_is_dropped(monkeypatch: pytest.MonkeyPatch, without: str | None, is_noticed: bool) -> None:
    """An idle peer that answers no ping is gone after keepalive time and ping timeout; each option is needed for it."""
    changes: dict[str, int | None] = {**KEEPALIVE} if without is None else {**KEEPALIVE, without: None}
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        await asyncio.sleep(0.1)
        connection.is_silent = True
        assert await closes_within(connection, 2.5) is is_noticed
        await served.check_alive()


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.soak
async def test_keepalive_timeout_on_a_full_pipe(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """A peer that takes nothing from its socket any more is dropped too; without the three options it stays."""
    changes: dict[str, int | None] = dict(KEEPALIVE) if is_set else dict.fromkeys(KEEPALIVE)
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        connection.call(COMPLETE, CompleteRequest(text="x", max_tokens=1).SerializeToString())
        await eventually(lambda: connection.statuses)
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]  # its type says nothing of reading
        await asyncio.sleep(2.2)
        connection.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await closes_within(connection, 0.5) is is_set


@pytest.mark.parametrize(("interval_ms", "is_tolerated"), [(100, True), (None, False)])
async def test_min_ping_interval(monkeypatch: pytest.MonkeyPatch, interval_ms: int | None, is_tolerated: bool) -> None:
    """A caller may ping at the allowed interval, calls or no calls; without the option it is told to be calm."""
    changes = {"grpc.http2.min_ping_interval_without_data_ms": interval_ms}
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        for _ in range(8):
            await asyncio.sleep(0.15)
            if connection.is_closed:
                break
            connection.ping()
        await asyncio.sleep(0.2)
        assert connection.goaway_codes == ([] if is_tolerated else [h2.errors.ErrorCodes.ENHANCE_YOUR_CALM])


async def test_ping_flood_is_ended() -> None:
    """With the server's own options, pings without pause end the connection with ENHANCE_YOUR_CALM."""
    async with serving(server=TCP) as served, wire(served.daemon.addresses[0]) as connection:
        while not connection.is_closed and connection.num_pings_sent < 100:
            connection.ping()
            await asyncio.sleep(0.02)  # slow enough to read what is said before the end
        assert connection.goaway_codes == [h2.errors.ErrorCodes.ENHANCE_YOUR_CALM]
        assert connection.num_pings_sent < 20
        await served.check_alive()


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_receive_message_length(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """Far too large a message is refused by the library, before it is in memory; without the limit it comes to the guard."""
    changes = {} if is_set else {"grpc.max_receive_message_length": -1}
    async with with_options(monkeypatch, changes) as served:
        async with Caller(served.daemon.addresses[0]) as caller:
            limit_bytes = server.MESSAGE_LIMIT_HEADROOM * served.daemon.settings.server.max_message_bytes
            error = await refused(caller.inference.Complete(CompleteRequest(text="x" * (limit_bytes + 100))))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.reason == ("" if is_set else "MESSAGE_TOO_LARGE")
        await served.check_alive()


async def test_max_send_message_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer over the limit is not sent; the same answer under it is."""
    async with with_options(monkeypatch, {}) as served:
        assert (await served.inference.GetModel(GetModelRequest(name="fake"))).model.name
    async with with_options(monkeypatch, {"grpc.max_send_message_length": 16}) as served:
        with pytest.raises(grpc.aio.AioRpcError):
            await served.inference.GetModel(GetModelRequest(name="fake"), timeout=1.0)


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_metadata_size(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """Headers over the hard limit are refused and the connection lives on; with other limits the same headers pass."""
    larger = {"grpc.max_metadata_size": 64 << 10, "grpc.absolute_max_metadata_size": 128 << 10}
    async with with_options(monkeypatch, {} if is_set else larger) as served:
        request = DetokenizeRequest(token_ids=[97])
        metadata = [("x-padding", "a" * (17 << 10))]
        if is_set:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.inference.Detokenize(request, metadata=metadata)
            assert wire_error(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            assert (await served.inference.Detokenize(request, metadata=metadata)).text == "a"
        assert (await served.inference.Detokenize(request)).text == "a"


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_connection_age(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """A call that never sends its message is gone with its connection, at age and grace; without the age it stays."""
    changes = {
        "grpc.max_connection_age_ms": 500 if is_set else None,
        "grpc.max_connection_age_grace_ms": 500,
    }
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        connection.call(COMPLETE, b"0123456789", is_whole=False)
        assert await closes_within(connection, 2) is is_set
        assert bool(connection.goaway_codes) is is_set


async def test_max_connection_age_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long grace the call in the old connection goes on after the connection's age."""
    changes = {"grpc.max_connection_age_ms": 300, "grpc.max_connection_age_grace_ms": 60_000}
    async with with_options(monkeypatch, changes) as served, wire(served.daemon.addresses[0]) as connection:
        connection.call(COMPLETE, b"0123456789", is_whole=False)
        assert not await closes_within(connection, 1)
        assert connection.goaway_codes


@pytest.mark.parametrize("is_set", [True, False])
async def test_max_pending_requests(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    """3,600 calls that come at once are all answered; with little room for those not yet taken, some are reset."""
    few = {"grpc.server.max_pending_requests": 10, "grpc.server.max_pending_requests_hard_limit": 20}
    async with with_options(monkeypatch, {} if is_set else few) as served, AsyncExitStack() as stack:
        address = served.daemon.addresses[0]
        connections = [await stack.enter_async_context(wire(address)) for _ in range(4)]
        for connection in connections:
            for _ in range(900):
                connection.call(CHECK, b"")

        def num_settled() -> int:
            return sum(len(connection.statuses.keys() | connection.reset_codes.keys()) for connection in connections)

        await eventually(lambda: num_settled() == 3600)
        statuses = [status for connection in connections for status in connection.statuses.values()]
        num_reset = sum(len(connection.reset_codes.keys() - connection.statuses.keys()) for connection in connections)
        if is_set:
            assert (set(statuses), num_reset) == ({0}, 0)
        else:
            assert num_reset + sum(status != 0 for status in statuses) > 0


async def test_so_reuseport(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second server on the port fails to bind; with the library's own default it would share it without a word."""
    async with with_options(monkeypatch, {"grpc.so_reuseport": 1}) as served:
        again = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
        assert again.add_insecure_port(served.daemon.addresses[0])
        await again.stop(None)
    async with with_options(monkeypatch, {}) as served:
        again = grpc.aio.server(options=UNCHANGED(ServerSettings()))
        with pytest.raises(RuntimeError):
            again.add_insecure_port(served.daemon.addresses[0])
        await again.stop(None)


def test_every_option_has_its_test_here() -> None:
    """An option that is added without one is found: its name must stand in this file."""
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    num_shown = {name: text.count(f'"{name}"') for name, _ in UNCHANGED(ServerSettings())}
    assert [name for name, count in num_shown.items() if not count] == []
