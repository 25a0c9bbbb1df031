"""Who calls, and whether they may: the one table of methods and roles, and what proves a role on each kind of address.

What is not in the table is refused. The interceptor that asks is `guard.py`; nothing else decides.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import unquote

import grpc.aio

from hotgraph_server.config import ServerSettings
from hotgraph_server.errors import HotgraphError, PermissionDeniedError, UnauthenticatedError
from hotgraph_server.rpc.credentials import HeldCredentials
from hotgraph_server.rpc.tokens import ROLES, Role, Token, Tokens

logger = logging.getLogger("hotgraph.access")

Context = grpc.aio.ServicerContext[Any, Any]

REQUIRED: Final[dict[str, Role]] = {
    "/hotgraph.v1.InferenceService/Generate": Role.USE,
    "/hotgraph.v1.InferenceService/Complete": Role.USE,
    "/hotgraph.v1.InferenceService/Tokenize": Role.USE,
    "/hotgraph.v1.InferenceService/Detokenize": Role.USE,
    "/hotgraph.v1.InferenceService/ListModels": Role.USE,
    "/hotgraph.v1.InferenceService/GetModel": Role.USE,
    "/hotgraph.v1.GraphService/ListGraphs": Role.USE,
    "/hotgraph.v1.GraphService/GetGraph": Role.USE,
    "/hotgraph.v1.GraphService/GetBudget": Role.USE,
    "/hotgraph.v1.GraphService/WatchGraphs": Role.USE,
    "/hotgraph.v1.GraphService/ExportProfile": Role.USE,
    "/hotgraph.v1.GraphService/PrewarmGraphs": Role.ADMIN,
    "/hotgraph.v1.GraphService/PinGraph": Role.ADMIN,
    "/hotgraph.v1.GraphService/UnpinGraph": Role.ADMIN,
    "/hotgraph.v1.GraphService/EvictGraph": Role.ADMIN,
    "/hotgraph.v1.GraphService/UpdateBudget": Role.ADMIN,
    "/hotgraph.v1.GraphService/ImportProfile": Role.ADMIN,
    "/hotgraph.v1.AdminService/GetStatus": Role.ADMIN,
    "/hotgraph.v1.AdminService/Drain": Role.ADMIN,
    "/hotgraph.v1.AdminService/ListClients": Role.ADMIN,
    # Balancers ask without a credential; it says serving or not, and nothing else.
    "/grpc.health.v1.Health/Check": Role.OPEN,
    "/grpc.health.v1.Health/Watch": Role.OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.USE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Role.USE,
}
READS: Final = frozenset({"GetStatus", "ListClients"})  # of the admin's methods, those that change nothing

AUTHORIZATION_KEY: Final = "authorization"
SCHEME: Final = "bearer "
MAX_NAME_CHARACTERS: Final = 256
SECONDS_PER_LOGGED_REFUSAL: Final = 1.0  # who knocks all day does not fill the log


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is proven: token/NAME or certificate/NAME. Empty: who could reach a socket or loopback, and no more is known."""

    name: str
    role: Role


NOBODY: Final = Caller("", Role.OPEN)
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)


class Access:
    """Decides for one server's addresses. `serves_admin`: whether the admin's methods are to be had on them at all.

    `is_admins_own`: whoever can open their Unix sockets is the admin.
    """

    def __init__(
        self, held: HeldCredentials, server: ServerSettings, *, serves_admin: bool = True, is_admins_own: bool = False
    ) -> None:
        self._held = held
        self._serves_admin = serves_admin
        self._socket_role = Role.ADMIN if is_admins_own else ROLES.get(server.socket_role)  # None: it proves nothing
        self._asks_for_certificate = server.tls_client_ca is not None
        self._asks_for_token = server.token_file is not None
        self._admins = frozenset(server.tls_admins)
        self._refusals = _Refusals()

    def authorise(self, method: str, context: Context) -> Caller:
        """Who calls, who is `current_caller` from now on. Raises UnauthenticatedError or PermissionDeniedError.

        The texts are the same whatever was wrong; the log has who and what.
        """
        required = REQUIRED.get(method)
        caller = NOBODY
        try:
            if required is None:
                raise PermissionDeniedError("this method is not served")
            if required is not Role.OPEN:
                caller = self._caller(context)
            if caller.role < required:
                raise PermissionDeniedError("the credential does not allow this call")
            if required is Role.ADMIN and not self._serves_admin:
                raise PermissionDeniedError("this call is not served on this address")
        except (UnauthenticatedError, PermissionDeniedError) as error:
            self._refusals.log(method, caller, context.peer(), error)
            raise
        current_caller.set(caller)
        if required is Role.ADMIN and method.rpartition("/")[2] not in READS:
            logger.info("%s by %s from %s", method, caller.name or "a local caller", context.peer())
        return caller

    def _caller(self, context: Context) -> Caller:
        peer = context.peer()
        if peer.startswith("unix:"):
            return self._local_caller(context)
        tokens = self._held.current.tokens
        if self._asks_for_token:
            token = _shown_token(context, tokens)
            return Caller(f"token/{token.name}", token.role)
        if self._asks_for_certificate:
            names = certificate_names(context)
            if not names:
                raise _unauthenticated()
            role = Role.ADMIN if self._admins.intersection(names) else Role.USE
            return Caller(f"certificate/{_printable(names[0])}", role)
        if not _is_loopback(peer):  # the start refuses addresses of the network; this holds whatever leads here
            raise _unauthenticated()
        return Caller("", Role.ADMIN)

    def _local_caller(self, context: Context) -> Caller:
        """On a Unix socket the file's mode has let the caller in. A token may give more than that, never less."""
        tokens = self._held.current.tokens
        if tokens is not None and (self._socket_role is None or _authorizations(context)):
            token = _shown_token(context, tokens)
            return Caller(f"token/{token.name}", max(token.role, self._socket_role or token.role))
        if self._socket_role is None:
            raise _unauthenticated()
        return Caller("", self._socket_role)


def certificate_names(context: Context) -> list[str]:
    """The alternative names of the certificate that the client showed, or its common name when it has none."""
    shown: dict[str, list[bytes]] = {key: list(values) for key, values in (context.auth_context() or {}).items()}
    names = shown.get("x509_subject_alternative_name") or shown.get("x509_common_name") or []
    return [name.decode(errors="replace") for name in names if name]


def _printable(name: str) -> str:
    """A name for logs: an authority may sign anything, line breaks too."""
    return "".join(character if character.isprintable() else "?" for character in name[:MAX_NAME_CHARACTERS])


def _shown_token(context: Context, tokens: Tokens | None) -> Token:
    shown = _authorizations(context)
    token = None
    if tokens is not None and len(shown) == 1 and shown[0][: len(SCHEME)].lower() == SCHEME:
        token = tokens.find(shown[0][len(SCHEME) :])
    if token is None:
        raise _unauthenticated()
    return token


def _authorizations(context: Context) -> list[str]:
    return [str(value) for key, value in context.invocation_metadata() or () if key == AUTHORIZATION_KEY]


def _unauthenticated() -> UnauthenticatedError:
    return UnauthenticatedError("no credential, or a wrong one")


def _is_loopback(peer: str) -> bool:
    """Of a peer as gRPC writes it: ipv4:127.0.0.1:4711, ipv6:%5B::1%5D:4711."""
    _, _, rest = unquote(peer).partition(":")
    try:
        return ip_address(rest.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


class _Refusals:
    """Logs refusals, one a second at most, with how many went unlogged."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._num_unlogged = 0

    def log(self, method: str, caller: Caller, peer: str, error: HotgraphError) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_PER_LOGGED_REFUSAL:
            self._num_unlogged += 1
            return
        more = f"; {self._num_unlogged} more since the last" if self._num_unlogged else ""
        self._last, self._num_unlogged = now, 0
        logger.warning("%s refused to %s from %s: %s%s", method, caller.name or "nobody", peer, error.message, more)
