"""Who may call, decided from what gRPC tells of a call; whole daemons are in tests/integration/test_security.py."""

from __future__ import annotations

from typing import Any

import pytest

from hotgraph_server.config import ServerSettings
from hotgraph_server.errors import PermissionDeniedError, UnauthenticatedError
from hotgraph_server.rpc.access import NOBODY, READS, REQUIRED, Access, current_caller
from hotgraph_server.rpc.credentials import Credentials, HeldCredentials
from hotgraph_server.rpc.tokens import Role

COMPLETE = "/hotgraph.v1.InferenceService/Complete"
STATUS = "/hotgraph.v1.AdminService/GetStatus"
HEALTH = "/grpc.health.v1.Health/Check"


class Context:
    """A call's context, as far as access looks."""

    def __init__(self, peer: str, **shown: list[bytes]) -> None:
        self._peer = peer
        self._shown = shown

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Any:
        return self._shown

    def invocation_metadata(self) -> Any:
        return ()


def access(**server: Any) -> Access:
    return Access(HeldCredentials(Credentials()), ServerSettings(**server))


@pytest.mark.parametrize(
    "peer", ["ipv4:127.0.0.1:1", "ipv4:127.8.8.8:65535", "ipv6:%5B::1%5D:1", "ipv6:[::1]:1", "unix:"]
)
def test_local_callers_are_trusted_by_default(peer: str) -> None:
    """On loopback and on sockets nothing is asked for, and nothing is known of the caller."""
    caller = access().authorise(STATUS, Context(peer))  # type: ignore[arg-type]
    assert (caller.name, caller.role) == ("", Role.ADMIN)
    assert current_caller.get() == caller


@pytest.mark.parametrize(
    "peer", ["ipv4:192.0.2.1:1", "ipv6:%5B2001:db8::1%5D:1", "ipv4:127.0.0.1.example:1", "vsock:2:1", "", "unknown"]
)
def test_callers_of_the_network_are_never_trusted(peer: str) -> None:
    """Should one get through to an address in the clear, by a forwarded port, all but health is refused."""
    context: Any = Context(peer)
    for method in (COMPLETE, STATUS):
        with pytest.raises(UnauthenticatedError):
            access().authorise(method, context)
    assert access().authorise(HEALTH, context) == NOBODY


def test_method_that_is_not_listed_is_refused() -> None:
    """Default deny, for the admin on a socket, too."""
    for method in ("/hotgraph.v1.AdminService/Shutdown", "/hotgraph.v1.inferenceservice/complete", "", COMPLETE + "/"):
        with pytest.raises(PermissionDeniedError):
            access().authorise(method, Context("unix:"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shown", "name", "role"),
    [
        ({"x509_common_name": [b"ops"]}, "certificate/ops", Role.ADMIN),
        ({"x509_common_name": [b"other"]}, "certificate/other", Role.USE),
        # A common name counts only where there is no alternative name.
        ({"x509_common_name": [b"ops"], "x509_subject_alternative_name": [b"b"]}, "certificate/b", Role.USE),
        ({"x509_subject_alternative_name": [b"b", b"ops"]}, "certificate/b", Role.ADMIN),
        ({"x509_common_name": [b"a\nERROR root \xff"]}, "certificate/a?ERROR root \ufffd", Role.USE),
    ],
)
def test_names_of_certificates(shown: dict[str, list[bytes]], name: str, role: Role) -> None:
    """Which name is taken, which is the admin's, and that no line break gets into the log."""
    settings = {"tls_client_ca": "ca", "tls_certificate": "c", "tls_key": "k", "tls_admins": ("ops",)}
    caller = access(**settings).authorise(COMPLETE, Context("ipv4:192.0.2.1:1", **shown))  # type: ignore[arg-type]
    assert (caller.name, caller.role) == (name, role)


def test_certificate_without_a_name_proves_nothing() -> None:
    """Nor does no certificate, should a connection come about without one."""
    decides = access(tls_client_ca="ca", tls_certificate="c", tls_key="k")
    for shown in ({}, {"x509_common_name": [b""]}):
        with pytest.raises(UnauthenticatedError):
            decides.authorise(COMPLETE, Context("ipv4:127.0.0.1:1", **shown))  # type: ignore[arg-type]


def test_what_changes_anything_is_the_admins_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """All methods of the admin service and all of the graph service that change it; each of the latter leaves a line."""
    words = ("Prewarm", "Pin", "Unpin", "Evict", "Update", "Import")
    changing = {m for m in REQUIRED if m.rpartition("/")[2].startswith(words) or m.endswith("/Drain")}
    assert {m for m, role in REQUIRED.items() if role is Role.ADMIN} == changing | {
        f"/hotgraph.v1.AdminService/{name}" for name in READS
    }
    caplog.set_level("INFO", "hotgraph.access")
    for method in sorted(REQUIRED):
        caplog.clear()
        access().authorise(method, Context("unix:"))  # type: ignore[arg-type]
        assert bool(caplog.messages) is (method in changing)


def test_refusals_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Of a thousand in a moment one is logged, or as many as seconds went by."""
    decides = access()
    for _ in range(1000):
        with pytest.raises(UnauthenticatedError):
            decides.authorise(COMPLETE, Context("ipv4:192.0.2.1:1"))  # type: ignore[arg-type]
    assert 1 <= len(caplog.messages) < 100
