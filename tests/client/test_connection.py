"""The connection under both clients, over the wire: retries, push-back, waiting, metadata, keepalive, TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hotgraph.v1 import (
    admin_service_pb2,
    graph_service_pb2,
)
from hotgraph_client import (
    AsyncClient,
    InternalError,
    QueueFullError,
    TlsConfig,
    UnavailableError,
)
from tests.client.drivers import Driver
from tests.client.scripted_server import (
    ScriptedServer,
    abort,
    details_metadata,
    error_info,
    serving,
    whole,
)


def failing(times: int, code: grpc.StatusCode, answer: Any, **trailers: str) -> tuple[Any, list[float]]:
    """An answer that fails so many times first, and the times at which it was asked."""
    asked: list[float] = []

    async def handler(request: Any, context: Any) -> Any:
        asked.append(asyncio.get_running_loop().time())
        if len(asked) <= times:
            metadata = details_metadata(code, "later", error_info("QUEUE_FULL"))
            await context.abort(
                code, "later", (*metadata, *((key.replace("_", "-"), value) for key, value in trailers.items()))
            )
        return answer

    return handler, asked


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_unary_calls_are_tried_again(server: ScriptedServer, driver: Driver, code: grpc.StatusCode) -> None:
    """UNAVAILABLE and RESOURCE_EXHAUSTED are tried again by gRPC, up to max_attempts in all."""
    handler, asked = failing(3, code, graph_service_pb2.GetBudgetResponse())
    server.answers["GetBudget"] = handler
    await driver.call("get_budget")
    assert len(asked) == 4


async def test_attempts_of_unary_calls_are_bounded(server: ScriptedServer, driver: Driver) -> None:
    """After max_attempts the last error is raised; other codes and EvictGraph are not tried again at all."""
    handler, asked = failing(99, grpc.StatusCode.UNAVAILABLE, None)
    server.answers["GetBudget"] = handler
    with pytest.raises(QueueFullError):
        await driver.call("get_budget")
    assert len(asked) == 4
    internal, internal_asked = failing(1, grpc.StatusCode.INTERNAL, None)
    evict, evict_asked = failing(1, grpc.StatusCode.UNAVAILABLE, None)
    server.answers |= {"GetStatus": internal, "EvictGraph": evict}
    with pytest.raises(QueueFullError):
        await driver.call("get_status")
    with pytest.raises(QueueFullError):
        await driver.call("evict_graph", "graphs/a")
    assert (len(internal_asked), len(evict_asked)) == (1, 1)


async def test_the_servers_push_back_is_kept(server: ScriptedServer, driver: Driver) -> None:
    """gRPC waits as long as the server's push-back says, and a negative one ends the tries."""
    handler, asked = failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, graph_service_pb2.GetBudgetResponse())
    late, late_asked = failing(
        1,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        graph_service_pb2.GetBudgetResponse(),
        grpc_retry_pushback_ms="700",
    )
    never, never_asked = failing(9, grpc.StatusCode.RESOURCE_EXHAUSTED, None, grpc_retry_pushback_ms="-1")
    server.answers["GetBudget"] = handler
    await driver.call("get_budget")
    server.answers["GetBudget"] = late
    await driver.call("get_budget")
    server.answers["GetBudget"] = never
    with pytest.raises(QueueFullError):
        await driver.call("get_budget")
    assert asked[1] - asked[0] < 0.5
    assert late_asked[1] - late_asked[0] >= 0.69
    assert len(never_asked) == 1


async def test_streams_are_tried_again_until_answered(server: ScriptedServer, driver: Driver) -> None:
    """A generation that was refused before its first message is tried again too."""

    async def refuse(request: Any, context: Any) -> None:
        await abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"))

    server.play(refuse, refuse, whole("abc"))
    assert (await driver.result()).text == "abc"
    assert len(server.requests) == 3


async def test_no_server(connect: Callable[..., Any], tmp_path: Path) -> None:
    """Without a server a call fails soon with UnavailableError."""
    driver = await connect(f"unix:{tmp_path / 'none.sock'}")
    with pytest.raises(UnavailableError):
        await driver.call("get_status", timeout=10)
    _, error = await driver.partial(seed=1, timeout=10)
    assert isinstance(error, UnavailableError)


async def test_wait_for_ready(connect: Callable[..., Any], socket_path: Path) -> None:
    """With wait_for_ready a call waits for a server that comes later."""
    driver = await connect(wait_for_ready=True)
    asking = asyncio.ensure_future(driver.call("get_status", timeout=20))
    scripted = ScriptedServer()
    scripted.answers["GetStatus"] = admin_service_pb2.GetStatusResponse(version="1")
    async with serving(scripted, f"unix:{socket_path}"):
        assert (await asking).version == "1"


async def test_metadata_of_calls(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    """Calls carry token, client id, session key and our user agent."""
    driver = await connect(token="secret", client_id="tests")
    server.play(whole("a"))
    await driver.result(session_key="s-1")
    metadata = server.metadata[0]
    assert metadata["authorization"] == "bearer secret"
    assert metadata["x-client-id"] == "tests"
    assert metadata["session_id"] == "s-1"
    assert str(metadata["user-agent"]).startswith("hotgraph-python")


async def test_long_quiet_calls_survive_keepalive(tmp_path: Path) -> None:
    """Pings during a call that is quiet for many of them do not end it on a server that allows them, as the daemon does.

    The control shows that the pings are really sent: a server with gRPC's defaults takes them for an attack.
    """

    async def quiet(request: Any, context: Any) -> Any:
        # gRPC pings once a second at most, and the default server bears with five: what is tested is this time's passing.
        await asyncio.sleep(8.0)
        return admin_service_pb2.GetStatusResponse(version="1")

    async def ask(path: Path, options: list[tuple[str, int]]) -> str:
        scripted = ScriptedServer()
        scripted.answers["GetStatus"] = quiet
        async with (
            serving(scripted, f"unix:{path}", options=options),
            AsyncClient(f"unix:{path}", keepalive_seconds=0.1, max_attempts=1) as client,
        ):
            return (await client.get_status(timeout=30)).version

    allowing = [("grpc.http2.min_ping_interval_without_data_ms", 500), ("grpc.keepalive_permit_without_calls", 1)]
    survived, control = await asyncio.gather(
        ask(tmp_path / "a.sock", allowing), ask(tmp_path / "b.sock", []), return_exceptions=True
    )
    assert survived == "1"
    assert isinstance(control, UnavailableError)


HUNG_SERVER = """
import asyncio, sys
from tests.client.scripted_server import ScriptedServer, broken, hang, serving
async def main():
    scripted = ScriptedServer()
    scripted.play(broken(hang, 2, "abc"))
    async with serving(scripted, "unix:" + sys.argv[1]):
        print("ready", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def hung_process(socket_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A server process of our own, which the test stops."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HUNG_SERVER, str(socket_path)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


async def test_a_hung_server_is_noticed(
    hung_process: subprocess.Popen[str], connect: Callable[..., Any], kind: str
) -> None:
    """A server process that stopped is found dead after keepalive and its timeout, though its socket stays open."""
    driver = await connect(keepalive_seconds=0.5, keepalive_timeout_seconds=0.5, max_attempts=1)
    loop = asyncio.get_running_loop()
    stopped_at: list[float] = []

    def stop(event: Any) -> None:
        if not stopped_at and getattr(event, "token_ids", None):
            os.kill(hung_process.pid, signal.SIGSTOP)
            stopped_at.append(loop.time())

    with pytest.raises(UnavailableError):
        await driver.result(resume=False, on_event=stop)
    assert loop.time() - stopped_at[0] < 10


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and a server's and a client's certificate of it, in PEM files."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test ca")
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text("subjectAltName=DNS:daemon.test\n")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder


@pytest.mark.parametrize("is_mutual", [False, True])
async def test_tls(connect: Callable[..., Any], certificates: Path, is_mutual: bool) -> None:
    """TLS and mutual TLS work with a CA of one's own and another server name; without the right side they fail."""

    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    credentials = grpc.ssl_server_credentials(
        [(read("server.key"), read("server.pem"))],
        root_certificates=read("ca.pem") if is_mutual else None,
        require_client_auth=is_mutual,
    )
    scripted = ScriptedServer()
    scripted.answers["GetStatus"] = admin_service_pb2.GetStatusResponse(version="1")
    async with serving(scripted, "127.0.0.1:0", credentials=credentials) as port:
        target = f"127.0.0.1:{port}"
        plain_tls = TlsConfig.from_files(root_certificates=certificates / "ca.pem", server_name="daemon.test")
        mutual_tls = TlsConfig.from_files(
            root_certificates=certificates / "ca.pem",
            private_key=certificates / "client.key",
            certificate_chain=certificates / "client.pem",
            server_name="daemon.test",
        )
        driver = await connect(target, tls=mutual_tls if is_mutual else plain_tls, token="secret")
        assert (await driver.call("get_status", timeout=20)).version == "1"
        assert scripted.metadata[0]["authorization"] == "bearer secret"
        wrong = await connect(target, tls=plain_tls if is_mutual else True, max_attempts=1)
        with pytest.raises((UnavailableError, InternalError)):
            await wrong.call("get_status", timeout=20)
