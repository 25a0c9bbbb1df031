"""TLS, client certificates, tokens and roles of a whole daemon, on the wire; each with the control that shows it can fail."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hotgraph.v1.admin_service_pb2 import DrainRequest, GetStatusRequest, ListClientsRequest
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import ModelSettings, ServerSettings, Settings
from hotgraph_server.engine import FakeEngine
from hotgraph_server.rpc import access
from hotgraph_server.rpc.tokens import Role
from tests.certificates import make_authority, make_certificate
from tests.integration.harness import (
    PATIENCE_SECONDS,
    Caller,
    Serving,
    WireError,
    eventually,
    letters,
    refused,
    serving,
    wire_error,
)
from tests.integration.processes import process

CODE = grpc.StatusCode
USE, ADMIN, WRONG = (secrets.token_urlsafe() for _ in range(3))
Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Two authorities; of the first two servers' certificates and three clients', of the second one of each."""
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        folder = Path(path)
        for authority in ("ca", "ca2"):
            make_authority(folder, authority)
        for name, authority in (("server", "ca"), ("server_b", "ca"), ("server2", "ca2")):
            make_certificate(folder, name, authority=authority)
        make_certificate(folder, "client", usage="clientAuth", names="DNS:client.test")
        make_certificate(folder, "operator", usage="clientAuth", names="URI:spiffe://test/ops,DNS:ops.test")
        make_certificate(folder, "nameless", usage="clientAuth", names="")
        make_certificate(folder, "client2", authority="ca2", usage="clientAuth", names="DNS:ops.test")
        yield folder


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """The daemon's own files: tls.crt, tls.key, ca.crt, tokens."""
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        own = Path(path)
        install(own, made, "server")
        (own / "ca.crt").write_bytes((made / "ca.pem").read_bytes())
        write_tokens(own, f"use alice {USE}\nadmin root {ADMIN}\n")
        yield own


def install(folder: Path, made: Path, name: str) -> None:
    """A pair as certbot and Kubernetes do it: whole files, one after the other."""
    for source, target in ((f"{name}.key", "tls.key"), (f"{name}.pem", "tls.crt")):
        new = folder / f".{target}"
        new.write_bytes((made / source).read_bytes())
        new.chmod(0o600)
        new.replace(folder / target)


def write_tokens(folder: Path, text: str) -> None:
    (folder / "tokens").write_text(text)
    (folder / "tokens").chmod(0o600)


def with_tls(folder: Path) -> dict[str, Any]:
    return {"tls_certificate": folder / "tls.crt", "tls_key": folder / "tls.key"}


def with_tokens(folder: Path) -> dict[str, Any]:
    return {"token_file": folder / "tokens"}


def listening(*addresses: str, step_seconds: float = 0.0, **server: Any) -> AbstractAsyncContextManager[Serving]:
    engine = FakeEngine(rule=letters, step_seconds=step_seconds)
    return serving(engine=engine, server={"listen": addresses or ("127.0.0.1:0",), **server})


async def last_kind(stream: Any) -> str:
    """The kind of a stream's last event."""
    kinds = [""]
    while (event := await stream.read()) is not grpc.aio.EOF:
        kinds.append(event.WhichOneof("event"))
    return kinds[-1]


def trust(made: Path, authority: str = "ca", client: str | None = None) -> grpc.ChannelCredentials:
    def read(name: str) -> bytes:
        return (made / name).read_bytes()

    own = (None, None) if client is None else (read(f"{client}.key"), read(f"{client}.pem"))
    return grpc.ssl_channel_credentials(read(f"{authority}.pem"), *own)


async def complete(caller: Caller, metadata: Metadata = ()) -> None:
    request = CompleteRequest(text="hello", max_tokens=2)
    await asyncio.wait_for(caller.inference.Complete(request, metadata=metadata), PATIENCE_SECONDS)


async def names_of_callers(caller: Caller, metadata: Metadata = ()) -> set[str]:
    return {
        client.identity for client in (await caller.admin.ListClients(ListClientsRequest(), metadata=metadata)).clients
    }


async def methods_of(caller: Caller, metadata: Metadata = ()) -> set[str]:
    """Every method of the running server, as reflection tells it."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(
        cast(Any, caller.channel)
    )  # its stubs know the blocking kind only

    async def ask(**what: Any) -> Any:
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**what)]), metadata=metadata)
        return await call.read()

    methods = set()
    for service in (await ask(list_services="")).list_services_response.service:
        files = (await ask(file_containing_symbol=service.name)).file_descriptor_response.file_descriptor_proto
        for file in map(descriptor_pb2.FileDescriptorProto.FromString, files):
            for declared in file.service:
                if f"{file.package}.{declared.name}" == service.name:
                    methods |= {f"/{service.name}/{method.name}" for method in declared.method}
    return methods


async def answer(caller: Caller, method: str, metadata: Metadata = ()) -> WireError | None:
    """How any method answers an empty message: None when it answers at all."""
    dial: Any = caller.channel.stream_stream(method)
    call = dial(iter([b""]), metadata=metadata, timeout=PATIENCE_SECONDS)

    async def first() -> None:
        if await call.read() is grpc.aio.EOF:
            await call.code()

    try:
        if method.endswith("/WatchGraphs"):  # says nothing while nothing happens
            await asyncio.wait_for(first(), 0.3)
        else:
            await first()
    except TimeoutError:
        return None
    except grpc.aio.AioRpcError as error:
        return wire_error(error)
    finally:
        call.cancel()
    return None


# Who may call what.


async def test_every_method_of_the_server_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reflection lists and what the table lists is the same; a method that the table forgets is found, and refused."""
    async with serving() as served:
        methods = await methods_of(served)
        assert methods == set(access.REQUIRED)
        forgotten = "/hotgraph.v1.InferenceService/Tokenize"
        error = await answer(served, forgotten)
        assert error is not None
        assert error.code == CODE.INVALID_ARGUMENT
        monkeypatch.delitem(access.REQUIRED, forgotten)
        assert methods - set(access.REQUIRED) == {forgotten}
        error = await answer(served, forgotten)
        assert error is not None
        assert (error.code, error.reason) == (CODE.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_walk_over_all_methods(folder: Path) -> None:
    """Without a token and with a wrong one all but health is UNAUTHENTICATED, with the same words; roles get what is theirs."""
    async with listening(**with_tokens(folder)) as served:
        methods = await methods_of(served, bearer(USE))
        assert len(methods) >= 24
        texts = set()
        for method in sorted(methods):
            required = access.REQUIRED[method]
            for metadata in (
                (),
                bearer(WRONG),
                bearer(USE[:-1]),
                (("authorization", USE),),
                (("authorization", f"Basic {USE}"),),
                (*bearer(USE), *bearer(WRONG)),
            ):
                error = await answer(served, method, metadata)
                if required is Role.OPEN:
                    assert error is None, method
                    continue
                assert error is not None, method
                assert (error.code, error.reason) == (CODE.UNAUTHENTICATED, "UNAUTHENTICATED"), method
                assert not error.metadata
                texts.add(error.message)
            error = await answer(served, method, bearer(USE))
            denied = error is not None and error.code in (CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED)
            assert denied is (required is Role.ADMIN), method
            assert not denied or (error is not None and error.reason == "PERMISSION_DENIED")
            if not method.endswith("/Drain"):
                error = await answer(served, method, bearer(ADMIN))
                assert error is None or error.code not in (CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED), method
        assert texts == {"no credential, or a wrong one"}
        await served.admin.Drain(DrainRequest(), metadata=bearer(ADMIN))
        await eventually(lambda: served.run.done())


async def test_without_credentials_loopback_and_sockets_are_open(folder: Path) -> None:
    """The control of the walk: by default every method can be called, with whatever token."""
    async with listening(f"unix:{folder}/s", "127.0.0.1:0") as served, Caller(served.daemon.addresses[1]) as tcp:
        for caller in (served, tcp):
            assert (await caller.status()).model == "fake"
            await complete(caller, bearer(WRONG))


async def test_identity_is_logged_and_listed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ListClients has the token's name; the log has who drained, and who was refused, and no token."""
    caplog.set_level("DEBUG")
    async with listening(**with_tokens(folder)) as served:
        await complete(served, bearer(USE))
        await complete(served, (*bearer(USE), ("x-client-id", "me")))
        await complete(served, (*bearer(ADMIN), ("x-client-id", "me")))
        clients = (await served.admin.ListClients(ListClientsRequest(), metadata=bearer(ADMIN))).clients
        assert sorted(client.identity for client in clients) == [
            "token/alice",
            "token/alice",
            "token/root",
            "token/root",
        ]
        assert len({client.name for client in clients}) == 4  # one who declares another's id is another
        error = await refused(served.admin.GetStatus(GetStatusRequest(), metadata=bearer(USE)))
        assert error.code == CODE.PERMISSION_DENIED
        await served.admin.Drain(DrainRequest(), metadata=bearer(ADMIN))
        await eventually(lambda: served.run.done())
    assert "AdminService/Drain by token/root from ipv4:127.0.0.1:" in caplog.text
    assert "AdminService/GetStatus refused to token/alice" in caplog.text
    assert not any(token in caplog.text for token in (USE, ADMIN))


@pytest.mark.parametrize(
    ("socket_role", "token", "use", "admin"),
    [
        ("admin", None, "OK", "OK"),
        ("use", None, "OK", "PERMISSION_DENIED"),
        ("use", ADMIN, "OK", "OK"),
        ("use", WRONG, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("none", None, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("none", USE, "OK", "PERMISSION_DENIED"),
        ("none", ADMIN, "OK", "OK"),
    ],
)
async def test_unix_sockets(folder: Path, socket_role: str, token: str | None, use: str, admin: str) -> None:
    """The socket's file lets in and gives a role by the settings; a token gives more, a wrong one nothing."""
    metadata = bearer(token) if token else ()
    async with listening(f"unix:{folder}/s", socket_role=socket_role, **with_tokens(folder)) as served:
        for call, expected in (
            (served.inference.Complete(CompleteRequest(text="x", max_tokens=1), metadata=metadata), use),
            (served.admin.GetStatus(GetStatusRequest(), metadata=metadata), admin),
        ):
            if expected == "OK":
                await call
            else:
                assert (await refused(call)).code.name == expected


async def test_admin_addresses_of_their_own(folder: Path) -> None:
    """With admin_listen the admin's methods are served there alone, for the admin alone, and its socket is 0600."""
    addresses: dict[str, Any] = {
        "admin_listen": (f"unix:{folder}/a", "127.0.0.1:0"),
        "socket_access": "group",
        **with_tokens(folder),
    }
    async with listening(f"unix:{folder}/s", "127.0.0.1:0", **addresses) as served:
        assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o660  # the control: this one is for the group
        _, tcp_address, admin_address, admin_tcp_address = served.daemon.addresses
        async with Caller(tcp_address) as tcp, Caller(admin_address) as admin, Caller(admin_tcp_address) as admin_tcp:
            for caller, metadata in ((served, ()), (tcp, bearer(ADMIN))):
                await complete(caller, metadata)
                error = await refused(caller.admin.GetStatus(GetStatusRequest(), metadata=metadata))
                assert (error.code, error.message) == (
                    CODE.PERMISSION_DENIED,
                    "this call is not served on this address",
                )
            error = await refused(admin_tcp.admin.GetStatus(GetStatusRequest(), metadata=bearer(USE)))
            assert error.code == CODE.PERMISSION_DENIED
            await admin_tcp.admin.GetStatus(GetStatusRequest(), metadata=bearer(ADMIN))
            stream = served.inference.Generate(GenerateRequest(text="x", max_tokens=40))
            await stream.read()
            await admin.admin.Drain(DrainRequest())
            assert await last_kind(stream) == "finished"
        await eventually(lambda: served.run.done())
    assert not (folder / "a").exists()
    assert not (folder / "s").exists()


# TLS.


async def test_tls_with_an_authority_of_ones_own(folder: Path, made: Path) -> None:
    """Who trusts the authority is served; who trusts another, or speaks in the clear, gets no connection."""
    async with listening(**with_tls(folder), **with_tokens(folder)) as served:
        address = served.daemon.addresses[0]
        async with Caller(address, credentials=trust(made)) as caller:
            await complete(caller, bearer(USE))
            assert (await refused(caller.inference.Complete(CompleteRequest(text="x")))).code == CODE.UNAUTHENTICATED
            health = await caller.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        for credentials in (trust(made, "ca2"), None):
            async with Caller(address, credentials=credentials) as caller:
                request = CompleteRequest(text="x", max_tokens=1)
                error = await refused(caller.inference.Complete(request, metadata=bearer(USE)))
                assert error.code == CODE.UNAVAILABLE


async def test_client_certificates(folder: Path, made: Path) -> None:
    """By the authority: served, as `use`, or as admin by name. None, or another's: no connection, whatever its name."""
    mutual: dict[str, Any] = {"tls_client_ca": folder / "ca.crt", "tls_admins": ("ops.test",)}
    async with listening(**with_tls(folder), **mutual) as served:
        address = served.daemon.addresses[0]
        for client in ("client", "nameless"):
            async with Caller(address, credentials=trust(made, client=client)) as caller:
                await complete(caller)
                assert (await refused(caller.admin.GetStatus(GetStatusRequest()))).code == CODE.PERMISSION_DENIED
        async with Caller(address, credentials=trust(made, client="operator")) as caller:
            await complete(caller)
            assert await names_of_callers(caller) == {
                "certificate/client.test",
                "certificate/hotgraph test nameless",
                "certificate/spiffe://test/ops",
            }
        for refused_client in (None, "client2"):
            async with Caller(address, credentials=trust(made, client=refused_client)) as caller:
                for call in (
                    caller.inference.Complete(CompleteRequest(text="x", max_tokens=1)),
                    caller.health.Check(health_pb2.HealthCheckRequest()),
                ):
                    assert (await refused(call)).code == CODE.UNAVAILABLE


async def test_certificate_and_token_are_both_wanted(folder: Path, made: Path) -> None:
    """With both settings the certificate opens the connection, and the token says who calls."""
    async with listening(**with_tls(folder), **with_tokens(folder), tls_client_ca=folder / "ca.crt") as served:
        async with Caller(served.daemon.addresses[0], credentials=trust(made, client="client")) as caller:
            assert (await refused(caller.inference.Complete(CompleteRequest(text="x")))).code == CODE.UNAUTHENTICATED
            await complete(caller, bearer(USE))
            assert "token/alice" in await names_of_callers(caller, bearer(ADMIN))
        async with Caller(served.daemon.addresses[0], credentials=trust(made)) as caller:
            request = CompleteRequest(text="x", max_tokens=1)
            assert (await refused(caller.inference.Complete(request, metadata=bearer(USE)))).code == CODE.UNAVAILABLE


# New credentials without a restart.


async def reload(served: Serving) -> None:
    await served.daemon.reload(lambda: served.daemon.settings)


async def test_tokens_are_read_again(folder: Path) -> None:
    """A new token is good and an old one is not from the reload on, not before; a bad file changes nothing and is told."""
    async with listening(step_seconds=0.005, **with_tokens(folder)) as served:
        stream = served.inference.Generate(GenerateRequest(text="x", max_tokens=300), metadata=bearer(USE))
        await stream.read()
        new = secrets.token_urlsafe()
        write_tokens(folder, f"use bob {new}\nadmin root {ADMIN}\n")
        await complete(served, bearer(USE))
        await reload(served)
        await complete(served, bearer(new))
        for token in (USE, WRONG):
            call = served.inference.Complete(CompleteRequest(text="x"), metadata=bearer(token))
            assert (await refused(call)).code == CODE.UNAUTHENTICATED
        write_tokens(folder, f"use bob {USE} and more\n")
        await reload(served)
        await complete(served, bearer(new))
        assert "reload refused: the token file" in served.daemon.describe()
        assert "line 1" in served.daemon.describe()
        assert USE not in served.daemon.describe()
        write_tokens(folder, f"use bob {new}\n")
        await reload(served)
        assert "reload refused" not in served.daemon.describe()
        assert served.scheduler.num_requests == 1, "the stream was over before: the test tests nothing"
        assert await last_kind(stream) == "finished"


async def test_certificates_are_read_again_and_streams_go_on(folder: Path, made: Path) -> None:
    """New connections see the new certificate, of another authority; an old one's stream goes on; a bad pair is kept out."""
    async with listening(step_seconds=0.005, **with_tls(folder), **with_tokens(folder)) as served:
        address = served.daemon.addresses[0]
        async with Caller(address, credentials=trust(made)) as old:
            stream = old.inference.Generate(GenerateRequest(text="x", max_tokens=500), metadata=bearer(USE))
            await stream.read()
            (folder / "tls.key").write_bytes((made / "server2.key").read_bytes())  # half of a rotation
            await reload(served)
            assert "mismatch" in served.daemon.describe()
            async with Caller(address, credentials=trust(made)) as caller:
                await complete(caller, bearer(USE))
            install(folder, made, "server2")
            await reload(served)
            assert "refused" not in served.daemon.describe()
            async with Caller(address, credentials=trust(made, "ca2")) as caller:
                await complete(caller, bearer(USE))
            async with Caller(address, credentials=trust(made)) as caller:
                assert (await refused(caller.inference.Complete(CompleteRequest(text="x")))).code == CODE.UNAVAILABLE
            await complete(old, bearer(USE))  # on the connection that it has
            assert served.scheduler.num_requests == 1, "the stream was over before: the test tests nothing"
            assert await last_kind(stream) == "finished"


async def test_client_authority_is_read_again(folder: Path, made: Path) -> None:
    """After the reload clients of the new authority are let in, and those of the old one no more: one is still demanded."""
    async with listening(**with_tls(folder), tls_client_ca=folder / "ca.crt") as served:
        address = served.daemon.addresses[0]
        (folder / "ca.crt").write_bytes((made / "ca2.pem").read_bytes())
        await reload(served)
        async with Caller(address, credentials=trust(made, client="client2")) as caller:
            await complete(caller)
        for client in (None, "client"):
            async with Caller(address, credentials=trust(made, client=client)) as caller:
                assert (await refused(caller.inference.Complete(CompleteRequest(text="x")))).code == CODE.UNAVAILABLE


NUM_ROTATIONS = 100


@pytest.mark.slow
async def test_rotations_under_load(folder: Path, made: Path) -> None:
    """A hundred rotations of certificate and tokens while callers connect anew for each call: not one call fails."""
    num_calls, is_over = 0, False

    async def call_on(address: str) -> None:
        nonlocal num_calls
        while not is_over:
            async with Caller(address, credentials=trust(made)) as caller:
                await complete(caller, bearer(USE))
            num_calls += 1

    async with listening(**with_tls(folder), **with_tokens(folder)) as served:
        callers = [asyncio.create_task(call_on(served.daemon.addresses[0])) for _ in range(4)]
        for index in range(NUM_ROTATIONS):
            install(folder, made, ("server_b", "server")[index % 2])
            write_tokens(folder, f"use alice {USE}\nuse bob {secrets.token_urlsafe()}\n")
            await reload(served)
            assert "refused" not in served.daemon.describe()
            await asyncio.sleep(0.02)
        is_over = True
        await asyncio.gather(*callers)
        assert num_calls >= NUM_ROTATIONS, "too few calls to mean anything"


# A process: what it refuses to start with, and signals.

PROGRAM = """
import logging, sys
from hotgraph_server.config import Settings
from hotgraph_server import daemon
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
settings = Settings.model_validate_json(sys.argv[1])
sys.exit(daemon.run(settings, load=lambda: settings))
"""


def of_process(*listen: str, **server: Any) -> Settings:
    return Settings(model=ModelSettings(source="fake"), server=ServerSettings(listen=listen, **server))


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("0.0.0.0:0", "nothing"),
        ("[::]:0", "nothing"),
        ("192.0.2.1:0", "nothing"),
        ("example.test:0", "nothing"),
        ("0.0.0.0:0", "tls"),
        ("0.0.0.0:0", "tokens"),
    ],
)
async def test_network_in_the_clear_is_refused(folder: Path, address: str, what: str) -> None:
    """Without TLS and authentication both, exit status 78 and one line; nothing was bound before."""
    server = {"nothing": {}, "tls": with_tls(folder), "tokens": with_tokens(folder)}[what]
    async with process(of_process(f"unix:{folder}/s", address, **server), PROGRAM) as daemon:
        assert await daemon.ended() == 78
        errors = [line for line in daemon.log if "ERROR" in line]
        assert len(errors) == 1
        assert "is open to the network" in errors[0]
        assert not any("Traceback" in line for line in daemon.log)
    assert not (folder / "s").exists()


async def test_admin_address_in_the_clear_is_refused(folder: Path) -> None:
    """The rule holds for the admin's addresses, too."""
    async with process(of_process(f"unix:{folder}/s", admin_listen=("0.0.0.0:0",)), PROGRAM) as daemon:
        assert await daemon.ended() == 78


@asynccontextmanager
async def on_the_network(folder: Path, **server: Any) -> AsyncIterator[tuple[Any, str]]:
    settings = of_process("0.0.0.0:0", **with_tls(folder), **with_tokens(folder), **server)
    async with process(settings, PROGRAM) as daemon:
        line = await daemon.logged("listening on")
        await daemon.logged("serving fake")
        yield daemon, f"localhost:{line.rpartition(':')[2]}"


async def test_network_with_tls_and_tokens_is_served_and_reloaded(folder: Path, made: Path) -> None:
    """The control of the refusals: with both it serves. SIGHUP takes new tokens, says so, and keeps them when a file is bad."""
    async with on_the_network(folder) as (daemon, address):
        async with Caller(address, credentials=trust(made)) as caller:
            await complete(caller, bearer(USE))
            new = secrets.token_urlsafe()
            write_tokens(folder, f"use alice {new}\n")
            install(folder, made, "server_b")
            daemon.signal(signal.SIGHUP)
            await daemon.logged("reloaded: certificates, tokens")
            await complete(caller, bearer(new))
            (folder / "tokens").chmod(0o644)
            daemon.signal(signal.SIGHUP)
            assert "open to every user" in await daemon.logged("reload refused, nothing has changed")
            await complete(caller, bearer(new))
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_credentials_of_systemd(folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths below $CREDENTIALS_DIRECTORY are found; without the variable the start is refused with 78."""
    server = {
        "tls_certificate": Path("$CREDENTIALS_DIRECTORY/tls.crt"),
        "tls_key": Path("$CREDENTIALS_DIRECTORY/tls.key"),
        "token_file": Path("$CREDENTIALS_DIRECTORY/tokens"),
    }
    assert "CREDENTIALS_DIRECTORY" not in os.environ
    async with process(of_process("0.0.0.0:0", **server), PROGRAM) as daemon:
        assert await daemon.ended() == 78
        assert any("CREDENTIALS_DIRECTORY is not set" in line for line in daemon.log)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    async with process(of_process("127.0.0.1:0", **server), PROGRAM) as daemon:
        address = (await daemon.logged("listening on")).rpartition(" ")[2]
        await daemon.logged("serving fake")
        async with Caller(address, credentials=trust(made)) as caller:
            await complete(caller, bearer(USE))
