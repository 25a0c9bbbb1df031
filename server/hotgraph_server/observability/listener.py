"""A listener for scrapes: GET /metrics over HTTP/1.1 and nothing else, on addresses that are guarded like those of gRPC.

On the event loop, a family of metrics at a time: other streams go on between two of them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from hotgraph_server.config import ServerSettings, Settings
from hotgraph_server.errors import SettingsError
from hotgraph_server.rpc.addresses import (
    TcpAddress,
    UnixAddress,
    UnixSocketClaim,
    bind_error,
    parse_address,
    private_umask,
)
from hotgraph_server.rpc.credentials import check_exposure, load_credentials, resolved
from hotgraph_server.rpc.tokens import Tokens

logger = logging.getLogger("hotgraph.metrics")

MAX_CONNECTIONS: Final = 16
MAX_HEADER_BYTES: Final = 8192
PATIENCE_SECONDS: Final = 10.0  # for a request to come and for its answer to be taken
SCHEME: Final = "bearer "
END_MARK: Final = b"# EOF\n"  # of OpenMetrics: once, at the end of all families


class _One:
    """A registry of one family, for the library's encoders."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class _RefusedError(Exception):
    def __init__(self, status: str, *headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


class MetricsListener:
    """Answers scrapes with `families`. Made on the event loop, which it keeps to."""

    def __init__(self, settings: Settings, families: Callable[[], Iterator[Metric]]) -> None:
        self._settings = settings
        self._families = families
        self._tokens: Tokens | None = None
        self._sockets: list[socket.socket] = []  # of TCP addresses, kept while servers come and go with certificates
        self._tcp_servers: list[asyncio.Server] = []
        self._local_servers: list[asyncio.Server] = []
        self._claims = ExitStack()
        self._connections: set[asyncio.Task[None]] = set()
        self.addresses: tuple[str, ...] = ()

    async def start(self) -> None:
        """Listens. Raises AddressInUseError or SettingsError, and then listens nowhere."""
        addresses = [parse_address(text) for text in self._settings.metrics.listen]
        # The rule of all listeners, with the tokens of this one.
        check_exposure(addresses, self._server_settings(), token_setting="metrics.token_file")
        try:
            bound = [await self._bind(address) for address in addresses]
            await self.reload()
        except BaseException:
            await self.stop()
            raise
        self.addresses = tuple(bound)
        if self.addresses:
            logger.info("metrics on %s", ", ".join(self.addresses))

    def _server_settings(self) -> ServerSettings:
        """The server's, with what is another for this listener. Who has a certificate that is in order may read metrics."""
        own = {"token_file": self._settings.metrics.token_file, "tls_admins": (), "socket_role": "admin"}
        return self._settings.server.model_copy(update=own)

    async def reload(self) -> None:
        """Serves TCP with certificates and tokens as they are now. Raises SettingsError, and then all stays as it was."""
        if not self._sockets:
            return
        server = self._server_settings()
        tokens = load_credentials(server).tokens
        context = _context(server)
        before, self._tcp_servers = self._tcp_servers, []
        for bound in self._sockets:
            self._tcp_servers.append(
                await asyncio.start_server(self._accept, sock=bound.dup(), ssl=context, limit=MAX_HEADER_BYTES)
            )
        self._tokens = tokens
        for old in before:
            old.close()

    async def _bind(self, address: UnixAddress | TcpAddress) -> str:
        """TCP addresses are bound only: they are served by `reload`."""
        if isinstance(address, UnixAddress):
            claim = UnixSocketClaim(address)
            claim.acquire()
            self._claims.callback(claim.release)
            with private_umask(self._settings.server.socket_access):
                self._local_servers.append(
                    await asyncio.start_unix_server(self._accept_local, str(address.path), limit=MAX_HEADER_BYTES)
                )
            return str(address)
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[
                0
            ]
            bound = socket.socket(family, kind, protocol)
            self._sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(target)
        except OSError:
            raise bind_error(address) from None
        return str(TcpAddress(address.host, bound.getsockname()[1]))

    async def stop(self) -> None:
        """Listens no more; connections are cut. May be called again."""
        for server in (*self._tcp_servers, *self._local_servers):
            server.close()
        for bound in self._sockets:
            bound.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        for kept in (self._tcp_servers, self._local_servers, self._sockets):
            kept.clear()
        self._claims.close()

    # One connection: one request, one answer.

    async def _accept_local(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(reader, writer, None)  # the socket's mode has let them in

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(reader, writer, self._tokens)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: Tokens | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._answer(reader, writer, tokens)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            logger.debug("a scrape was given up: %s", type(error).__name__)
        except asyncio.CancelledError:
            # By `stop`, which waits for the task's end. Python 3.11 would print a traceback for a cancelled one.
            logger.debug("a scrape was cut off: the daemon stops")
        finally:
            self._connections.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: Tokens | None) -> None:
        try:
            headers = await _read_request(reader)
            if tokens is not None:
                _check_token(tokens, headers.get("authorization", ""))
        except _RefusedError as refusal:
            logger.info("a scrape was refused: %s", refusal.status)
            head = (f"HTTP/1.1 {refusal.status}", *refusal.headers, "Content-Length: 0", "Connection: close", "", "")
            writer.write("\r\n".join(head).encode())
            return
        body, content_type = await self._body(headers.get("accept", ""))
        head = ("HTTP/1.1 200 OK", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "Connection: close")
        writer.write("\r\n".join((*head, "", "")).encode() + body)

    async def _body(self, accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        is_open_metrics = "openmetrics" in content_type
        parts: list[bytes] = []
        for family in self._families():
            parts.append(encode(_One(family)).removesuffix(END_MARK))
            await asyncio.sleep(0)
        return b"".join((*parts, END_MARK) if is_open_metrics else parts), content_type


async def _read_request(reader: asyncio.StreamReader) -> dict[str, str]:
    """The headers of a GET of /metrics. Raises _RefusedError."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _RefusedError("431 Request Header Fields Too Large") from None
    request, *lines = head.decode("latin-1").split("\r\n")
    words = request.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _RefusedError("400 Bad Request")
    if words[1].partition("?")[0] != "/metrics":
        raise _RefusedError("404 Not Found")
    if words[0] != "GET":
        raise _RefusedError("405 Method Not Allowed", "Allow: GET")
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _context(server: ServerSettings) -> ssl.SSLContext | None:
    """TLS as the settings have it, from files that `load_credentials` has tried. Raises SettingsError."""
    if server.tls_certificate is None or server.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(resolved(server.tls_certificate), resolved(server.tls_key), password="")
        if server.tls_client_ca is not None:
            context.load_verify_locations(resolved(server.tls_client_ca))
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # they were replaced since they were tried
        raise SettingsError(f"the certificate {server.tls_certificate} is of no use: {type(error).__name__}") from None
    return context


def _check_token(tokens: Tokens, shown: str) -> None:
    if shown[: len(SCHEME)].lower() != SCHEME or tokens.find(shown[len(SCHEME) :]) is None:
        raise _RefusedError("401 Unauthorized", "WWW-Authenticate: Bearer")
