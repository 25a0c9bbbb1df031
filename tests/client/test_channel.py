"""How a channel is set up, without one: targets, tokens, options, the service config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hotgraph_client import AsyncClient, Client, TlsConfig
from hotgraph_client.channel import ChannelConfig, is_local, service_config, session_metadata


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("unix:hotgraph.sock", True),
        ("unix:///run/hotgraph.sock", True),
        ("unix-abstract:hotgraph", True),
        ("localhost:50051", True),
        ("127.0.0.1:50051", True),
        ("127.8.8.8:1", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("10.0.0.1:50051", False),
        ("[fe80::1]:50051", False),
        ("example.org:50051", False),
        ("localhost.example.org:50051", False),
        ("dns://127.0.0.1/example.org:50051", False),
        ("dns:///example.org:1", False),
    ],
)
def test_is_local(target: str, expected: bool) -> None:
    """Only Unix sockets and loopback addresses are local, and a list only when all of it is."""
    assert is_local(target) is expected


@pytest.mark.parametrize("client_type", [AsyncClient, Client])
def test_a_token_stays_off_plain_networks(client_type: Any) -> None:
    """A token is refused for another host without TLS, unless the caller says that the path is safe."""
    with pytest.raises(ValueError, match="plain text"):
        client_type("10.0.0.1:50051", token="t")
    client_type("10.0.0.1:50051", token="t", allow_insecure_token=True)
    client_type("10.0.0.1:50051", token="t", tls=True)
    client_type("unix:x.sock", token="t")
    client_type("10.0.0.1:50051")


@pytest.mark.parametrize(
    "settings",
    [
        {"target": ""},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"max_attempts": 0},
        {"max_attempts": 6},
        {"keepalive_seconds": 0},
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    """Settings that cannot work are refused when the client is made."""
    with pytest.raises(ValueError, match=r"."):
        Client(**settings)


def test_tls_needs_both_halves() -> None:
    """A key without its chain is refused."""
    with pytest.raises(ValueError, match="both"):
        TlsConfig(private_key=b"key")


def test_tls_from_files(tmp_path: Path) -> None:
    """TlsConfig.from_files reads what it is given and leaves out the rest."""
    (tmp_path / "ca.pem").write_bytes(b"ca")
    config = TlsConfig.from_files(root_certificates=tmp_path / "ca.pem", server_name="daemon")
    assert config == TlsConfig(root_certificates=b"ca", server_name="daemon")
    with pytest.raises(OSError, match="missing"):
        TlsConfig.from_files(root_certificates=tmp_path / "missing")


def test_the_callers_options_win() -> None:
    """A channel option of the caller replaces ours of the same name, and others are added."""
    extra = [("grpc.keepalive_time_ms", 77), ("grpc.x", 1)]
    options = ChannelConfig("unix:x", keepalive_seconds=3, keepalive_timeout_seconds=2, extra_options=extra).options()
    assert len(dict(options)) == len(options)
    assert dict(options)["grpc.keepalive_time_ms"] == 77
    assert dict(options)["grpc.http2.ping_timeout_ms"] == 2000
    assert dict(options)["grpc.x"] == 1


def test_no_proxy_for_local_targets() -> None:
    """A proxy of the environment is not asked for this host."""
    assert dict(ChannelConfig("127.0.0.1:1").options())["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in dict(ChannelConfig("10.0.0.1:1").options())


def test_service_config() -> None:
    """UNAVAILABLE and RESOURCE_EXHAUSTED are tried again with throttling, EvictGraph never, and one attempt means none."""
    config = json.loads(service_config(3))
    everything, evict = config["methodConfig"]
    assert everything["name"] == [{}]
    assert everything["retryPolicy"]["maxAttempts"] == 3
    assert everything["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    assert evict == {"name": [{"service": "hotgraph.v1.GraphService", "method": "EvictGraph"}]}
    assert config["retryThrottling"] == {"maxTokens": 20, "tokenRatio": 0.2}
    assert "retryPolicy" not in json.loads(service_config(1))["methodConfig"][0]


def test_metadata() -> None:
    """Each call carries the token, asked for anew when it is a function, and the client's id."""
    tokens = iter(["one", "two"])
    config = ChannelConfig("unix:x", token=lambda: next(tokens), client_id="me")
    assert config.metadata() == (("authorization", "bearer one"), ("x-client-id", "me"))
    assert config.metadata(("k", "v"))[0] == ("authorization", "bearer two")
    assert ChannelConfig("unix:x").metadata() == ()


def test_session_metadata() -> None:
    """A session key goes into metadata for balancers: as it is, or hashed when a header cannot hold it."""
    assert session_metadata("") == ()
    assert session_metadata("user-7") == (("session_id", "user-7"),)
    for key in ("é", " a", "a\n"):
        ((_, value),) = session_metadata(key)
        assert len(value) == 64
        assert value.isalnum()


def test_no_secrets_in_reprs() -> None:
    """Neither a token nor a private key shows in a repr."""
    tls = TlsConfig(private_key=b"the key", certificate_chain=b"chain")
    config = ChannelConfig("unix:x", token="the token", tls=tls)
    assert "the key" not in repr(config)
    assert "the token" not in repr(config)
    assert "the token" not in repr(Client("unix:x", token="the token"))
