"""How a channel to a daemon is set up: target, credentials, options, retries, metadata. It opens none and makes no call.

Retries of calls that were not answered yet are gRPC's own, told by a service config (`service_config`); going on with a
stream that broke after its first event is `resume.py`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc

MAX_RECEIVE_BYTES = 64 << 20  # a long completion with log-probabilities is larger than gRPC's default of 4 MiB
MAX_ATTEMPTS = 5  # gRPC takes no more

RETRY_FIRST_BACKOFF_SECONDS = 0.1
RETRY_MAX_BACKOFF_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM bytes. Without root certificates the system's are trusted; key and chain (both or none) are for mutual TLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str | None = None  # the name in the server's certificate, when the target has another

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("mutual TLS needs both private_key and certificate_chain")

    @classmethod
    def from_files(
        cls,
        *,
        root_certificates: Path | str | None = None,
        private_key: Path | str | None = None,
        certificate_chain: Path | str | None = None,
        server_name: str | None = None,
    ) -> TlsConfig:
        """The same, read from PEM files. Raises OSError when one cannot be read."""

        def read(path: Path | str | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return cls(read(root_certificates), read(private_key), read(certificate_chain), server_name)


Option = tuple[str, Any]
Token = str | Callable[[], str]


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """All that a client was told about its connection. Raises ValueError for what cannot work or is not safe."""

    target: str
    token: Token | None = field(default=None, repr=False)
    tls: TlsConfig | None = None
    timeout_seconds: float | None = None
    max_attempts: int = 4
    wait_for_ready: bool = False
    keepalive_seconds: float = 10.0
    keepalive_timeout_seconds: float = 5.0
    client_id: str = ""
    allow_insecure_token: bool = False
    extra_options: Sequence[Option] = ()

    def __post_init__(self) -> None:
        check_timeout(self.timeout_seconds)
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(f"max_attempts must be 1 to {MAX_ATTEMPTS}, not {self.max_attempts}")
        if not (self.keepalive_seconds > 0 and self.keepalive_timeout_seconds > 0):
            raise ValueError("keepalive_seconds and keepalive_timeout_seconds must be positive")
        if not self.target:
            raise ValueError("the target is empty")
        if self.token is not None and self.tls is None and not self.allow_insecure_token and not is_local(self.target):
            raise ValueError(
                f"a token would go to {self.target} in plain text: use tls, or allow_insecure_token when the path is safe"
            )

    def options(self) -> list[Option]:
        """The channel's options; those of the caller come last and win."""
        ours: dict[str, Any] = {
            "grpc.primary_user_agent": user_agent(),
            "grpc.service_config": service_config(self.max_attempts),
            "grpc.use_local_subchannel_pool": 1,  # a connection of its own: gRPC would share those of like channels
            "grpc.max_receive_message_length": MAX_RECEIVE_BYTES,
            # A dead server shows after keepalive + timeout, however quiet the call: the ping's own timer is the second
            # option, the third alone does not end a connection whose peer still acknowledges TCP.
            "grpc.keepalive_time_ms": int(self.keepalive_seconds * 1000),
            "grpc.http2.ping_timeout_ms": int(self.keepalive_timeout_seconds * 1000),
            "grpc.keepalive_timeout_ms": int(self.keepalive_timeout_seconds * 1000),
            "grpc.http2.max_pings_without_data": 0,  # a long prefill sends nothing for many pings
            "grpc.keepalive_permit_without_calls": 0,
            # A restarted daemon is found again soon.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 2000,
        }
        if is_local(self.target):
            ours["grpc.enable_http_proxy"] = 0
        if self.tls is not None and self.tls.server_name is not None:
            ours["grpc.ssl_target_name_override"] = self.tls.server_name
        return list((ours | dict(self.extra_options)).items())

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain text."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            self.tls.root_certificates, self.tls.private_key, self.tls.certificate_chain
        )

    def metadata(self, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        """What every call carries; a token that is a function is asked each time."""
        pairs = []
        if self.token is not None:
            pairs.append(("authorization", f"bearer {self.token if isinstance(self.token, str) else self.token()}"))
        if self.client_id:
            pairs.append(("x-client-id", self.client_id))
        return (*pairs, *more)


def session_metadata(session_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that a balancer hashes; a key that no header may hold goes as its SHA-256."""
    if not session_key:
        return ()
    is_plain = session_key.isascii() and session_key.isprintable() and session_key == session_key.strip()
    return (("session_id", session_key if is_plain else hashlib.sha256(session_key.encode()).hexdigest()),)


def check_timeout(timeout_seconds: float | None) -> None:
    """Raises ValueError for a timeout that is not a positive number of seconds."""
    if timeout_seconds is not None and not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout_seconds}")


def user_agent() -> str:
    try:
        return f"hotgraph-python/{version('hotgraph')}"
    except PackageNotFoundError:  # run from a source tree
        return "hotgraph-python"


def service_config(max_attempts: int) -> str:
    """gRPC's service config as JSON: which calls it tries again by itself, and how often.

    UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, up to max_attempts in all, as long as nothing was answered: a stream
    is answered with its first message. gRPC waits as long as the server's `grpc-retry-pushback-ms` says (a negative one
    ends the tries), else 0.1 s, 0.2 s, 0.4 s with jitter. Throttling: each failure takes one of 20 tokens and each success
    gives back a fifth of one; at half or less nothing is tried again, so that a dead server is not hammered. EvictGraph is
    never tried again: a second time it would fail although the first one worked.
    """
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": f"{RETRY_FIRST_BACKOFF_SECONDS}s",
        "maxBackoff": f"{RETRY_MAX_BACKOFF_SECONDS}s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    retried: dict[str, Any] = {"name": [{}]}
    if max_attempts > 1:  # gRPC refuses a policy of one attempt
        retried["retryPolicy"] = policy
    not_retried = {"name": [{"service": "hotgraph.v1.GraphService", "method": "EvictGraph"}]}
    return json.dumps({"methodConfig": [retried, not_retried], "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2}})


def is_local(target: str) -> bool:
    """Whether every address of the target is a Unix socket or this host's loopback, judged from the text alone."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = target.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("///")
    return all(_is_loopback(_host(address)) for address in addresses.split(","))


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] if address.count(":") == 1 else address


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
