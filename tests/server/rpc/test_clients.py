"""The memory of callers: who is who, and that it does not grow without end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.errors import InvalidRequestError
from hotgraph_server.rpc.clients import ClientRegistry


class Context:
    """A call's context, as far as the registry looks."""

    def __init__(self, peer: str, client_id: str = "") -> None:
        self._peer = peer
        self._client_id = client_id

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return (("user-agent", "test"), *((("x-client-id", self._client_id),) if self._client_id else ()))


def touch(registry: ClientRegistry, peer: str, client_id: str = "") -> Any:
    return registry.touch(Context(peer, client_id))  # type: ignore[arg-type]


def test_declared_id_outlives_the_connection() -> None:
    """With an id it is one client on two connections; without, each connection is one."""
    registry = ClientRegistry()
    assert touch(registry, "ipv4:1:1", "a") is touch(registry, "ipv4:1:2", "a")
    assert touch(registry, "ipv4:1:1") is not touch(registry, "ipv4:1:2")
    assert touch(registry, "ipv4:1:2", "a").identity == "ipv4:1:2#a"
    assert touch(registry, "unix:").identity == "unix:"
    assert len(registry) == 4


@pytest.mark.parametrize("client_id", ["a b", "ü", "a/b", "x" * 129, "a\n"])
def test_odd_ids_are_refused(client_id: str) -> None:
    """An id must fit into a resource name."""
    with pytest.raises(InvalidRequestError):
        touch(ClientRegistry(), "unix:", client_id)


def test_active_requests_are_counted_even_when_they_fail() -> None:
    """The count goes down however the request ends."""
    client = touch(ClientRegistry(), "unix:")

    def failing_request() -> None:
        with client.request():
            assert client.num_active_requests == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_request()
    assert (client.num_active_requests, client.num_requests) == (0, 1)


@given(st.lists(st.integers(0, 30), max_size=200))
def test_memory_is_bounded_and_keeps_the_last_seen(order: list[int]) -> None:
    """Never more than the bound; the ones seen last are there."""
    registry = ClientRegistry(max_clients=5)
    for number in order:
        touch(registry, "unix:", f"c{number}")
        assert len(registry) <= 5
    latest = list(dict.fromkeys(reversed(order)))[:5]
    assert {client.name for client in registry.by_name()} == {f"c{number}" for number in latest}


def test_busy_clients_are_forgotten_last() -> None:
    """A client with a running request stays while there is an idle one to forget."""
    registry = ClientRegistry(max_clients=2)
    with touch(registry, "unix:", "busy").request():
        touch(registry, "unix:", "idle")
        touch(registry, "unix:", "new")
        assert [client.name for client in registry.by_name()] == ["busy", "new"]
