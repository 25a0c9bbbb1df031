"""The gRPC server, put together: options, listeners, the guard, our services and the standard ones."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from graphcache import Clock
from hotgraph.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    graph_service_pb2,
    graph_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from hotgraph_server.config import ServerSettings, Settings
from hotgraph_server.errors import HotgraphError, SettingsError
from hotgraph_server.rpc.access import Access
from hotgraph_server.rpc.addresses import (
    TcpAddress,
    UnixAddress,
    UnixSocketClaim,
    bind_error,
    parse_address,
    private_umask,
)
from hotgraph_server.rpc.admin import AdminServicer, Drain
from hotgraph_server.rpc.call import CallObserver
from hotgraph_server.rpc.clients import ClientRegistry
from hotgraph_server.rpc.credentials import Credentials, HeldCredentials, check_exposure, load_credentials
from hotgraph_server.rpc.graph import GraphServicer
from hotgraph_server.rpc.guard import ActiveCalls, Guard
from hotgraph_server.rpc.health import OVERALL, WARM, HealthServicer
from hotgraph_server.rpc.inference import InferenceServicer
from hotgraph_server.rpc.lifecycle import Lifecycle, ServedModel
from hotgraph_server.rpc.reflection import add_reflection
from hotgraph_server.rpc.watch import EventHub

logger = logging.getLogger("hotgraph.rpc")

Context = grpc.aio.ServicerContext[Any, Any]

INFERENCE_SERVICE: Final = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
GRAPH_SERVICE: Final = graph_service_pb2.DESCRIPTOR.services_by_name["GraphService"].full_name
ADMIN_SERVICE: Final = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
OUR_SERVICES: Final = (INFERENCE_SERVICE, GRAPH_SERVICE, ADMIN_SERVICE)
HEALTH_SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

OWN_QUEUE: Final = frozenset({f"{HEALTH_SERVICE}/Check"})  # of new calls

KIB: Final = 1024
QUIET_SECONDS: Final = 0.05  # in which a call that has arrived is taken, on a busy machine, too

# gRPC ignores an option it does not know, so each of these is provoked on the wire by a test.
# A second daemon must fail to bind, not share the port silently.
SO_REUSEPORT: Final = 0
# Bursts beyond these come back as CANCELLED, which no client retries.
MAX_PENDING_REQUESTS: Final = 8192
MAX_PENDING_REQUESTS_HARD_LIMIT: Final = 16384
# Connections that never finish the handshake; the library's default holds them for two minutes.
SERVER_HANDSHAKE_TIMEOUT_MS: Final = 5_000
# Below the usual limit of open files.
MAX_CONNECTIONS: Final = 4096
# A peer that vanished, or is stopped, is noticed in 15 s at most: the timeout of pings is an option of its own.
KEEPALIVE_TIME_MS: Final = 10_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000
PING_TIMEOUT_MS: Final = 5_000
# Clients may ping every 10 s through a long quiet call; by default the library would drop their connection for that.
MIN_PING_INTERVAL_MS: Final = 5_000
# Up to this many times the limit of one message the guard refuses, with details; beyond, the library does, before it has
# the message in memory.
MESSAGE_LIMIT_HEADROOM: Final = 4
# Headers: refused at random above the first, always above the second.
MAX_METADATA_BYTES: Final = 8 * KIB
ABSOLUTE_MAX_METADATA_BYTES: Final = 16 * KIB
# Calls that never send their message hold a place until their connection is renewed.
MAX_CONNECTION_AGE_MS: Final = 30 * 60 * 1000
CONNECTION_AGE_GRACE_EXTRA_MS: Final = 60_000
LET_GO_SECONDS: Final = 5.0  # for a server that ended by itself to let go of its addresses


def channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    """Options of the server, by their names in the library."""
    return [
        ("grpc.so_reuseport", SO_REUSEPORT),
        # Twice what one client may hold open: near the limit even a well-behaved client's new streams are refused. It stops
        # rapid-reset floods, the better the lower it is; admission is the scheduler's.
        ("grpc.max_concurrent_streams", settings.max_connection_streams),
        ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_REQUESTS_HARD_LIMIT),
        ("grpc.server_handshake_timeout_ms", SERVER_HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_HEADROOM * settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", ABSOLUTE_MAX_METADATA_BYTES),
        ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MS),
        (
            "grpc.max_connection_age_grace_ms",
            int(settings.max_request_seconds * 1000) + CONNECTION_AGE_GRACE_EXTRA_MS,
        ),
    ]


class _WithoutRegistration:
    """The server as the generated code sees it, which adds each service twice: as a handler, and method by method.

    The first is enough, and for each call the library walks over all methods that were added by the second. But those have a
    queue of new calls each, and all others one together: so that whoever asks for health does not stand behind a flood of
    other calls, that method is added both ways.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Nothing for most: the generic handler has them."""
        chosen = {name: handler for name, handler in method_handlers.items() if f"{service_name}/{name}" in OWN_QUEUE}
        if chosen:
            self._server.add_registered_method_handlers(service_name, chosen)


class RpcServer:
    """Listens, and serves what the lifecycle allows. Made on the event loop, which it keeps to."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle, *, clock: Clock, drain: Drain) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._clients = ClientRegistry()
        self._inference = InferenceServicer(lifecycle, self._clients, settings, clock)
        self._graph = GraphServicer(lifecycle, clock)
        self._admin = AdminServicer(lifecycle, self._clients, drain)
        self._health = HealthServicer([OVERALL, *OUR_SERVICES, WARM])
        self._held = HeldCredentials(Credentials())
        self._calls = ActiveCalls()
        self._guards: dict[int, Guard] = {}  # by server
        self._observer: CallObserver | None = None
        self._loops: list[asyncio.Future[Any]] = []  # of the servers: done when one has ended, for whatever reason
        self._keepers: list[asyncio.Task[None]] = []
        self._endings: set[asyncio.Task[None]] = set()  # of servers that were replaced
        self._is_stopping = False
        self.on_failure: Callable[[HotgraphError], None] | None = None
        has_admin_listener = bool(settings.server.admin_listen)
        self._access = [Access(self._held, settings.server, serves_admin=not has_admin_listener)]
        if has_admin_listener:
            self._access.append(Access(self._held, settings.server, is_admins_own=True))
        self._servers = [self._make_server(index) for index in range(len(self._access))]
        self._claims = ExitStack()
        self.addresses: tuple[str, ...] = ()

    def _make_server(self, index: int) -> grpc.aio.Server:
        """A server of all services, for the addresses that the access of this number decides for."""
        guard = Guard(
            OUR_SERVICES,
            authorise=self._access[index].authorise,
            admit=self._admit,
            max_message_bytes=self._settings.server.max_message_bytes,
            calls=self._calls,
        )
        guard.observer = self._observer
        self._guards[index] = guard
        made = grpc.aio.server(interceptors=(guard,), options=channel_options(self._settings.server))
        server: Any = _WithoutRegistration(made)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        graph_service_pb2_grpc.add_GraphServiceServicer_to_server(self._graph, server)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.server.reflection:
            add_reflection(server, (*OUR_SERVICES, HEALTH_SERVICE))
        return made

    def _admit(self, method: str, context: Context) -> None:
        """Who may call what now. Raises the refusal. The admin service answers in every state."""
        self._clients.touch(context)
        if not method.startswith(f"/{ADMIN_SERVICE}/"):
            self._lifecycle.require()

    async def start(self) -> None:
        """Binds every address and answers. Raises AddressInUseError or SettingsError, and then listens nowhere."""
        server = self._settings.server
        addresses = [parse_address(text) for text in server.listen]
        admin_addresses = [parse_address(text) for text in server.admin_listen]
        check_exposure([*addresses, *admin_addresses], server)
        self._held.current = self.load_credentials()
        try:
            bound = [[self._bind(self._servers[0], address, server.socket_access) for address in addresses]]
            if len(self._servers) > 1:
                bound.append([self._bind(self._servers[1], address, "owner") for address in admin_addresses])
            self.addresses = tuple(address for each in bound for address in each)
            self._loops = [await _started(listening) for listening in self._servers]
        except BaseException:
            for listening in self._servers:
                await listening.stop(None)
            self._claims.close()
            raise
        current = self._held.current
        if current.tls is not None or current.tokens is not None:
            logger.info("TCP addresses: %s", ", ".join(_demands(current)))

        modes = (server.socket_access, "owner")
        self._keepers = [
            asyncio.get_running_loop().create_task(self._keep(index, each, modes[index]), name="listening")
            for index, each in enumerate(bound)
        ]

    async def _keep(self, index: int, addresses: Sequence[str], socket_access: str) -> None:
        """Makes a server anew whose loop ends by itself, on the same addresses. Calls of the old one go on.

        gRPC's own loop ends when it meets a path that is not UTF-8, which any peer can send before it is asked who it is
        (1.85.1). One that cannot be made anew is a failure of the daemon.
        """
        while True:
            await asyncio.wait([self._loops[index]])
            if self._is_stopping:
                return
            logger.error("gRPC's server ended by itself: it is made anew")
            old = self._servers[index]
            try:
                made = self._make_server(index)
                for address in map(parse_address, addresses):
                    await self._bind_again(made, address, socket_access)
                self._servers[index] = made
                self._loops[index] = await _started(made)
            except HotgraphError as error:
                logger.critical("nothing listens on %s any more: %s", ", ".join(addresses), error.message)
                if self.on_failure is not None:
                    self.on_failure(error)
                return
            finally:
                ending = asyncio.get_running_loop().create_task(old.stop(self._settings.server.max_request_seconds))
                self._endings.add(ending)
                ending.add_done_callback(self._forget_ending)
            if self._is_stopping:
                await made.stop(None)

    def _forget_ending(self, ending: asyncio.Task[None]) -> None:
        self._endings.discard(ending)
        if not ending.cancelled() and (error := ending.exception()) is not None:
            logger.debug("a server that had ended by itself: %s", type(error).__name__)

    async def _bind_again(self, server: grpc.aio.Server, address: UnixAddress | TcpAddress, access: str) -> None:
        """As soon as the old server has let go of the address, which it does by itself. Raises what `_bind` does."""
        end = asyncio.get_running_loop().time() + LET_GO_SECONDS
        while True:
            is_late = asyncio.get_running_loop().time() > end
            # It removes its socket's path, and would remove that of the new one.
            is_free = not isinstance(address, UnixAddress) or not os.path.exists(address.path)  # noqa: ASYNC240  (one look)
            if is_free or is_late:
                with private_umask(access if isinstance(address, UnixAddress) else "owner"):
                    if self._add_port(server, address):
                        return
                if is_late:
                    raise bind_error(address) if isinstance(address, TcpAddress) else SettingsError(str(address))
            await asyncio.sleep(0.002)

    def _bind(self, server: grpc.aio.Server, address: UnixAddress | TcpAddress, access: str) -> str:
        if isinstance(address, UnixAddress):
            claim = UnixSocketClaim(address)
            claim.acquire()
            self._claims.callback(claim.release)
            with private_umask(access):
                if not self._add_port(server, address):
                    raise SettingsError(f"cannot listen on {address.path}")
            return str(address)
        port = self._add_port(server, address)
        if not port:
            raise bind_error(address)
        return str(TcpAddress(address.host, port))

    def _add_port(self, server: grpc.aio.Server, address: UnixAddress | TcpAddress) -> int:
        """The bound port, 0 when it could not be bound. gRPC tells no reason."""
        try:
            if isinstance(address, TcpAddress) and self._held.current.tls is not None:
                return server.add_secure_port(str(address), self._held.server_credentials())
            return server.add_insecure_port(str(address))
        except RuntimeError:
            return 0

    def load_credentials(self) -> Credentials:
        """Reads the files of certificates and tokens, for `set_credentials`. Blocks; for any thread. Raises SettingsError."""
        return load_credentials(self._settings.server)

    def set_credentials(self, credentials: Credentials) -> tuple[str, ...]:
        """Connections made from now on, and calls, go by these. Returns what is new of them, for people."""
        before, self._held.current = self._held.current, credentials
        changed = {"certificates": before.tls != credentials.tls, "tokens": before.tokens != credentials.tokens}
        return tuple(name for name, is_new in changed.items() if is_new)

    def open(self, served: ServedModel) -> EventHub:
        """The model is loaded: the lifecycle serves it. Health says so."""
        hub = self._graph.open(served)
        self._health.set([OVERALL, *OUR_SERVICES], is_serving=True)
        return hub

    def apply(self, settings: Settings) -> None:
        """Takes over what a reload may change. Listeners and their options stay as they are."""
        self._inference.apply(settings)

    @property
    def num_calls(self) -> int:
        """Calls of our services that are inside."""
        return self._calls.count

    def observe(self, observer: CallObserver) -> None:
        """Has it hear of every call of our services from now on."""
        self._observer = observer
        for guard in self._guards.values():
            guard.observer = observer

    def set_warm(self) -> None:
        """Health says that what was queued for capture at the start is captured."""
        self._health.set([WARM], is_serving=True)

    def set_not_serving(self) -> None:
        """Health says that new calls are refused. Calls under way go on."""
        self._health.set([OVERALL, *OUR_SERVICES, WARM], is_serving=False)

    def end_watchers(self) -> None:
        """Calls that have no end of their own, those that watch graphs or health, end now."""
        self._graph.close()
        self._health.close()

    async def wait_idle(self) -> None:
        """Until no call of our services is inside, and none that has arrived is still to be taken.

        What gRPC has of such ones when it stops it ends as CANCELLED, as if their callers had left.
        """
        await self._calls.wait_quiet(QUIET_SECONDS)

    async def stop(self, grace_seconds: float) -> None:
        """Listens no more; what is left after the grace is cut off. Sockets are removed."""
        self._is_stopping = True
        self.end_watchers()
        try:
            await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
            for ending in self._endings:
                ending.cancel()
            if self._keepers:
                await asyncio.wait(self._keepers)
        finally:
            self._inference.close()
            self._claims.close()


async def _started(server: grpc.aio.Server) -> asyncio.Task[Any]:
    """Starts it. Returns the task of its own loop, the first that starting makes: gRPC tells nobody when that ends."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    found: list[asyncio.Task[Any]] = []

    def make(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
        loop.set_task_factory(before)
        found.append(loop.create_task(work, **more))
        return found[0]

    loop.set_task_factory(make)
    try:
        await server.start()
    finally:
        loop.set_task_factory(before)
    return found[0]


def _demands(credentials: Credentials) -> list[str]:
    """What a caller meets on TCP, for the log."""
    tls, tokens = credentials.tls, credentials.tokens
    return [
        "in the clear" if tls is None else "TLS",
        *(["a client's certificate"] if tls is not None and tls.client_ca is not None else []),
        *([f"one of {len(tokens)} tokens"] if tokens is not None else []),
    ]
