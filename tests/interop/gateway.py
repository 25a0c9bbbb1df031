"""A gRPC gateway with TLS, mutual TLS and bearer tokens before a daemon, which has none of them. It passes any method on."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from hotgraph_server.errors import UnauthenticatedError
from hotgraph_server.rpc.status import status_of

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
HOP_KEYS = frozenset({"user-agent", "authorization", "content-type", "te"})  # of one connection, not of the call

EXTENSIONS = {
    "ca": "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign",
    "server": "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth",
    "client": "subjectAltName=DNS:client.test\nextendedKeyUsage=clientAuth",
}


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
        make_certificates(self._folder)
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


def make_certificates(folder: Path) -> None:
    """A CA, and a server's and a client's certificate of it: NAME.pem and NAME.key (PKCS 8)."""

    def openssl(*arguments: str) -> None:
        environment = {**os.environ, "OPENSSL_CONF": os.devnull}
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60, env=environment
        )

    for name, extensions in EXTENSIONS.items():
        (folder / f"{name}.ext").write_text(extensions + "\n")
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{name}.key")
        openssl("req", "-new", "-key", f"{name}.key", "-subj", f"/CN=hotgraph test {name}", "-out", f"{name}.csr")
        signer = ["-signkey", "ca.key"] if name == "ca" else ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        request = ["-in", f"{name}.csr", "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem"]
        openssl("x509", "-req", *request, *signer)
