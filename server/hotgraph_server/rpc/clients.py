"""Who calls: a bounded memory of peers with their counts. It knows the call's metadata and nothing of its message."""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import grpc.aio

from hotgraph_server.errors import InvalidRequestError, Violation
from hotgraph_server.rpc.access import current_caller

CLIENT_ID_KEY: Final = "x-client-id"
CLIENT_ID_RULE: Final = "must be 1 to 128 of [A-Za-z0-9._:-]"
_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_CLIENTS: Final = 4096
MAX_USER_AGENT_CHARACTERS: Final = 256


@dataclass(slots=True)
class Client:
    """One caller: who declared an id or proved who they are, on whichever connections, or else a connection.

    Times are seconds since the epoch."""

    name: str  # the id alone, without clients/
    declared_id: str
    peer: str
    user_agent: str
    proven: str  # token/NAME or certificate/NAME, else empty
    first_seen_time: float
    last_seen_time: float
    num_active_requests: int = 0
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def identity(self) -> str:
        """What the scheduler tells callers apart by."""
        origin = self.proven or self.peer
        return f"{origin}#{self.declared_id}" if self.declared_id else origin

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request as active while inside."""
        self.num_requests += 1
        self.num_active_requests += 1
        try:
            yield
        finally:
            self.num_active_requests -= 1


@lru_cache(MAX_CLIENTS)
def _name_of(peer: str) -> str:
    return hashlib.sha256(peer.encode()).hexdigest()[:16]


class ClientRegistry:
    """The clients seen last; beyond `max_clients` the one unseen for longest is forgotten, idle ones first."""

    def __init__(self, *, max_clients: int = MAX_CLIENTS, clock: Callable[[], float] = time.time) -> None:
        self._clients: OrderedDict[str, Client] = OrderedDict()
        self._max_clients = max_clients
        self._clock = clock

    def __len__(self) -> int:
        return len(self._clients)

    def touch(self, context: grpc.aio.ServicerContext[Any, Any]) -> Client:
        """The caller of this call, seen now. Raises InvalidRequestError for a declared id that is none."""
        declared_id, user_agent = "", ""
        for key, value in context.invocation_metadata() or ():
            if key == CLIENT_ID_KEY:
                declared_id = str(value)
            elif key == "user-agent":
                user_agent = str(value)[:MAX_USER_AGENT_CHARACTERS]
        if declared_id and not _CLIENT_ID.fullmatch(declared_id):
            raise InvalidRequestError([Violation(CLIENT_ID_KEY, CLIENT_ID_RULE)])
        return self._seen(context.peer(), declared_id, user_agent, current_caller.get().name)

    def _seen(self, peer: str, declared_id: str, user_agent: str, proven: str) -> Client:
        name = declared_id or _name_of(proven or peer)
        if declared_id and proven:  # who declares another's id is not taken for them
            name = f"{declared_id}~{_name_of(proven)}"
        now = self._clock()
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, declared_id, peer, user_agent, proven, now, now)
            self._forget_one_beyond_the_bound()
        else:
            self._clients.move_to_end(name)
        client.last_seen_time = now
        client.peer = peer
        client.user_agent = user_agent
        return client

    def _forget_one_beyond_the_bound(self) -> None:
        if len(self._clients) <= self._max_clients:
            return
        newest = next(reversed(self._clients))
        idle = (key for key, client in self._clients.items() if not client.num_active_requests and key != newest)
        del self._clients[next(idle, next(iter(self._clients)))]

    def by_name(self) -> list[Client]:
        """All of them, in the order of their names, which never changes."""
        return sorted(self._clients.values(), key=lambda client: client.name)
