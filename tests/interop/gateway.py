"""A gRPC gateway with TLS, mutual TLS and bearer tokens before a daemon that is asked for none. It passes any method on.

The daemon can do all of it itself, but only in one way at a time; this saves two more daemons with a model.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from hotgraph_server.errors import UnauthenticatedError
from hotgraph_server.rpc.status import status_of
from tests.certificates import make_authority, make_certificate

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
HOP_KEYS = frozenset({"user-agent", "authorization", "content-type", "te"})  # of one connection, not of the call


class Gateway:
    """`tls` and `mutual_tls` are what `addresses.json` says of them, once it runs."""

    def __init__(self, folder: Path, upstream: str) -> None:
        self.tls: dict[str, str] = {}
        self.mutual_tls: dict[str, str] = {}
        self._folder = folder
        self._upstream = upstream
        self._token = secrets.token_urlsafe()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        make_authority(self._folder, "ca")
        make_certificate(self._folder, "server")
        make_certificate(self._folder, "client", usage="clientAuth", names="DNS:client.test")
        async with grpc.aio.insecure_channel(self._upstream, OPTIONS) as channel:
            with_token = await self._serve(channel, self._token)
            with_certificate = await self._serve(channel, None)
            ca = str(self._folder / "ca.pem")
            self.tls = {"target": with_token[1], "root_certificates": ca, "token": self._token}
            self.mutual_tls = {
                "target": with_certificate[1],
                "root_certificates": ca,
                "certificate_chain": str(self._folder / "client.pem"),
                "private_key": str(self._folder / "client.key"),
            }
            try:
                yield
            finally:
                for server in (with_token[0], with_certificate[0]):
                    await server.stop(0)

    async def _serve(self, channel: grpc.aio.Channel, token: str | None) -> tuple[grpc.aio.Server, str]:
        """A server that asks for the token, or, when there is none, for a certificate of the client."""

        def read(name: str) -> bytes:
            return (self._folder / name).read_bytes()

        credentials = grpc.ssl_server_credentials(
            [(read("server.key"), read("server.pem"))],
            root_certificates=read("ca.pem") if token is None else None,
            require_client_auth=token is None,
        )
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((PassOn(channel, token),))
        port = server.add_secure_port("localhost:0", credentials)
        await server.start()
        return server, f"localhost:{port}"


class PassOn(grpc.GenericRpcHandler):
    """Every method, as a stream of bytes both ways: so are unary calls on the wire."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None) -> None:
        self._channel = channel
        self._token = token

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method: str = handler_call_details.method

        async def pass_on(requests: Any, context: Any) -> AsyncIterator[bytes]:
            metadata = [(key, value) for key, value in context.invocation_metadata()]
            if self._token is not None and ("authorization", f"bearer {self._token}") not in metadata:
                status = status_of(UnauthenticatedError("no token, or a wrong one"))
                await context.abort(status.code, status.message, status.trailing_metadata)
            call: Any = self._channel.stream_stream(method)(
                requests,
                metadata=[pair for pair in metadata if pair[0] not in HOP_KEYS],
                timeout=context.time_remaining(),
            )
            try:
                async for message in call:
                    yield message
            except grpc.aio.AioRpcError as error:
                trailing = [(key, value) for key, value in error.trailing_metadata() or ()]
                await context.abort(error.code(), error.details() or "", trailing)

        return grpc.stream_stream_rpc_method_handler(pass_on)
