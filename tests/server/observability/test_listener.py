"""The listener for scrapes: who may read, what is refused, and that nobody can hold it up; over plain TCP, TLS and a socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import ssl
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hotgraph_server.config import MetricsSettings
from hotgraph_server.errors import AddressInUseError, SettingsError
from hotgraph_server.observability import listener
from tests.certificates import make_authority, make_certificate
from tests.integration.harness import Serving, eventually, serving
from tests.server.observability.scraping import exchange, scrape

TOKEN, OTHER = secrets.token_urlsafe(), secrets.token_urlsafe()
LOCAL = MetricsSettings(listen=("127.0.0.1:0",))


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """An authority, certificates of a server and a client, and a file with a token."""
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        folder = Path(path)
        make_authority(folder, "ca")
        make_certificate(folder, "server")
        make_certificate(folder, "server_b")
        make_certificate(folder, "client", usage="clientAuth")
        (folder / "tokens").write_text(f"use prometheus {TOKEN}\n")
        (folder / "tokens").chmod(0o600)
        yield folder


def address(served: Serving) -> str:
    return served.daemon.observability.addresses[0]


def trusting(folder: Path, client: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if client:
        context.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return context


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?name[]=x HTTP/1.0", 200),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/../etc/passwd HTTP/1.1", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("hello", 400),
        ("GET /metrics SPDY/9", 400),
    ],
)
async def test_one_page_and_nothing_else(request_line: str, status: int) -> None:
    """GET of /metrics is answered; everything else is refused with an empty answer."""
    async with serving(metrics=LOCAL) as served:
        answer = await scrape(address(served), request=request_line)
    assert answer.status == status
    assert bool(answer.body) == (status == 200)


async def test_large_headers() -> None:
    """A request beyond its bound is refused, and the next is served."""
    async with serving(metrics=LOCAL) as served:
        data = b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (3 * listener.MAX_HEADER_BYTES) + b"\r\n\r\n"
        try:
            answer = await exchange(address(served), data)
        except ConnectionResetError:  # cut off before all of it was sent
            answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 431 ")
        assert (await scrape(address(served))).status == 200


async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that ask for nothing are closed, those beyond the bound at once; then scrapes are served again."""
    monkeypatch.setattr(listener, "PATIENCE_SECONDS", 0.5)
    async with serving(metrics=LOCAL) as served:
        host, _, port = address(served).rpartition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(listener.MAX_CONNECTIONS + 3)]
        ends = await asyncio.gather(*(reader.read() for reader, _ in opened), return_exceptions=True)
        assert all(end == b"" or isinstance(end, ConnectionResetError) for end in ends)
        assert (await scrape(address(served))).status == 200
        for _, writer in opened:
            writer.close()


@pytest.mark.parametrize("protection", [{}, {"tls": True}, {"token": True}])
async def test_a_network_in_the_clear_is_refused(made: Path, protection: dict[str, bool]) -> None:
    """An address that others can reach wants TLS and a credential, or the daemon does not start."""
    server: dict[str, Any] = {}
    if protection.get("tls"):
        server = {"tls_certificate": made / "server.pem", "tls_key": made / "server.key"}
    token_file = made / "tokens" if protection.get("token") else None
    with pytest.raises(SettingsError, match=r"open to the network.*"):
        async with serving(server=server, metrics=MetricsSettings(listen=("0.0.0.0:0",), token_file=token_file)):
            raise AssertionError("it started")


async def test_tls_and_tokens(made: Path) -> None:
    """With TLS and a token a network's address serves who shows it; the server's own tokens are of no use here."""
    (made / "server_tokens").write_text(f"admin ops {OTHER}\n")
    (made / "server_tokens").chmod(0o600)
    server = {
        "tls_certificate": made / "server.pem",
        "tls_key": made / "server.key",
        "token_file": made / "server_tokens",
    }
    metrics = MetricsSettings(listen=("0.0.0.0:0",), token_file=made / "tokens")
    async with serving(server=server, metrics=metrics) as served:
        target = address(served).replace("0.0.0.0", "127.0.0.1")
        context = trusting(made)
        assert (await scrape(target, token=TOKEN, context=context)).status == 200
        for token in ("", OTHER):
            refused = await scrape(target, token=token, context=context)
            assert (refused.status, refused.body) == (401, "")
        with pytest.raises((ConnectionError, ssl.SSLError, ValueError)):  # what is there does not speak in the clear
            await scrape(target, token=TOKEN)


async def test_client_certificates_and_reload(made: Path) -> None:
    """Without a certificate of the authority nobody reads; after a reload the new certificate is served, a bad one is not."""
    live = made / "live"
    live.mkdir()
    for end in ("pem", "key"):
        (live / f"server.{end}").write_bytes((made / f"server.{end}").read_bytes())
    (live / "server.key").chmod(0o600)
    server = {
        "tls_certificate": live / "server.pem",
        "tls_key": live / "server.key",
        "tls_client_ca": made / "ca.pem",
    }
    async with serving(server=server, metrics=LOCAL) as served:

        async def shown() -> bytes | None:
            host, _, port = address(served).rpartition(":")
            context = trusting(made, "client")
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            certificate: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return certificate

        assert (await scrape(address(served), context=trusting(made, "client"))).status == 200
        with pytest.raises((ConnectionError, ssl.SSLError, ValueError)):
            await scrape(address(served), context=trusting(made))
        before = await shown()
        for end in ("pem", "key"):
            (live / f"server.{end}").write_bytes((made / f"server_b.{end}").read_bytes())
        await served.daemon.observability.reload()
        after = await shown()
        assert before != after
        (live / "server.pem").write_text("no certificate")
        with pytest.raises(SettingsError):
            await served.daemon.observability.reload()
        assert await shown() == after


async def test_unix_socket(made: Path) -> None:
    """On a Unix socket, which is not for others, no token is asked for; the socket goes with the daemon."""
    path = made / "m"
    metrics = MetricsSettings(listen=(f"unix:{path}",), token_file=made / "tokens")
    async with serving(server={"socket_access": "group"}, metrics=metrics) as served:
        assert (await scrape(address(served))).status == 200
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert not path.exists()


async def test_a_taken_address() -> None:
    """When another has the address the daemon does not start, and says so."""
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    try:
        with pytest.raises(AddressInUseError, match=str(port)):
            async with serving(metrics=MetricsSettings(listen=(f"127.0.0.1:{port}",))):
                raise AssertionError("it started")
    finally:
        taken.close()


async def test_a_scrape_that_the_end_cuts_off(caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that stops while it answers a scrape cuts it off, without a word above debug."""
    async with serving(metrics=MetricsSettings(listen=("127.0.0.1:0",))) as served:
        scrapes = [asyncio.create_task(scrape(address(served))) for _ in range(4)]
        own = served.daemon.observability._listener
        assert own is not None
        await eventually(lambda: own._connections)
        caplog.clear()
        await served.daemon.observability.stop()
        ends = await asyncio.gather(*scrapes, return_exceptions=True)
        assert any(isinstance(end, ConnectionError) for end in ends)
        assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
