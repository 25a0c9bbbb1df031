"""The daemon's own credentials: certificate, key, the authority of clients, and tokens; read, checked, kept, read again.

What is read is tried before it is used: a certificate that does not fit its key, or is out of date, would otherwise show only
when a client fails to connect.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import grpc

from hotgraph_server.config import ServerSettings
from hotgraph_server.errors import SettingsError
from hotgraph_server.rpc.addresses import TcpAddress, UnixAddress
from hotgraph_server.rpc.tokens import Tokens, parse_tokens

CREDENTIALS_VARIABLE: Final = "CREDENTIALS_DIRECTORY"  # systemd's, for what LoadCredential= names
MAX_FILE_BYTES: Final = 1 << 20
_HANDSHAKE_ROUNDS: Final = 10  # TLS 1.3 takes two


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM bytes. With `client_ca` clients have to show a certificate by it."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is in force at one time."""

    tls: TlsMaterial | None = None
    tokens: Tokens | None = None


class HeldCredentials:
    """The credentials in force, which may be replaced while the server runs; only by ones of the same kinds."""

    def __init__(self, current: Credentials) -> None:
        self.current = current  # replaced as a whole: gRPC's threads read it

    def server_credentials(self) -> grpc.ServerCredentials:
        """For one address: each new connection gets what is in force then. Raises SettingsError without TLS."""
        used = self.current.tls
        if used is None:
            raise SettingsError("there is no certificate to speak TLS with")

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called on gRPC's threads, before each handshake. None: as before."""
            nonlocal used
            now = self.current.tls
            if now is None or now is used:
                return None
            used = now
            return now.configuration()

        # That a certificate is demanded has to be said here again; the authority alone demands none.
        fetcher = cast(
            Callable[[], grpc.ServerCertificateConfiguration], fetch
        )  # the stubs forget that it may say None
        return grpc.dynamic_ssl_server_credentials(used.configuration(), fetcher, used.client_ca is not None)


def check_exposure(
    addresses: list[UnixAddress | TcpAddress], server: ServerSettings, *, token_setting: str = "server.token_file"
) -> None:
    """Whether the settings fit together, and nothing is open to a network. Raises SettingsError, which ends the start."""
    has_tls = server.tls_certificate is not None
    if has_tls != (server.tls_key is not None):
        raise SettingsError("server.tls_certificate and server.tls_key go together")
    if server.tls_client_ca is not None and not has_tls:
        raise SettingsError("server.tls_client_ca wants server.tls_certificate and server.tls_key")
    if server.tls_admins and (server.tls_client_ca is None or server.token_file is not None):
        raise SettingsError("server.tls_admins is for server.tls_client_ca without server.token_file")
    if server.socket_role == "none" and server.token_file is None:
        raise SettingsError('server.socket_role = "none" wants server.token_file')
    has_authentication = server.token_file is not None or server.tls_client_ca is not None
    for address in addresses:
        if isinstance(address, UnixAddress) or address.is_loopback or (has_tls and has_authentication):
            continue
        missing = [] if has_tls else ["TLS (server.tls_certificate, server.tls_key)"]
        if not has_authentication:
            missing.append(f"authentication ({token_setting} or server.tls_client_ca)")
        raise SettingsError(f"{address} is open to the network: it wants {' and '.join(missing)}")


def load_credentials(server: ServerSettings, environment: Mapping[str, str] | None = None) -> Credentials:
    """Reads and tries the files that the settings name. Blocks. Raises SettingsError with the file and the reason.

    A path that begins with $CREDENTIALS_DIRECTORY is below the folder that the variable names.
    """
    environment = os.environ if environment is None else environment
    tls: TlsMaterial | None = None
    if server.tls_certificate is not None and server.tls_key is not None:
        certificate, key = resolved(server.tls_certificate, environment), resolved(server.tls_key, environment)
        client_ca = None if server.tls_client_ca is None else resolved(server.tls_client_ca, environment)
        tls = _load_tls(certificate, key, client_ca)
    tokens: Tokens | None = None
    if server.token_file is not None:
        path = resolved(server.token_file, environment)
        try:
            text = _read(path, "token", is_private=True).decode()
        except UnicodeDecodeError:
            raise SettingsError(f"the token file {path} is no text") from None
        tokens = parse_tokens(text, f"the token file {path}")
    return Credentials(tls, tokens)


def resolved(path: Path, environment: Mapping[str, str] | None = None) -> Path:
    """Where a file of the settings is. Raises SettingsError."""
    environment = os.environ if environment is None else environment
    if not path.parts or path.parts[0] not in (f"${CREDENTIALS_VARIABLE}", f"${{{CREDENTIALS_VARIABLE}}}"):
        return path
    folder = environment.get(CREDENTIALS_VARIABLE)
    if not folder:
        raise SettingsError(f"{path}: {CREDENTIALS_VARIABLE} is not set; systemd sets it when LoadCredential= is used")
    return Path(folder, *path.parts[1:])


def _read(path: Path, what: str, *, is_private: bool = False) -> bytes:
    """Raises SettingsError, also when others may read or write what is private."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"the {what} file {path} is no file")
            if is_private and status.st_mode & 0o007:
                raise SettingsError(f"the {what} file {path} is open to every user: chmod o= it")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"the {what} file {path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"the {what} file {path} has more than {MAX_FILE_BYTES} bytes")
    return data


def _load_tls(certificate: Path, key: Path, client_ca: Path | None) -> TlsMaterial:
    def read() -> TlsMaterial:
        return TlsMaterial(
            _read(certificate, "certificate"),
            _read(key, "key", is_private=True),
            None if client_ca is None else _read(client_ca, "client CA"),
        )

    material = read()
    _try(certificate, key)
    if client_ca is not None:
        _context(ssl.PROTOCOL_TLS_CLIENT, lambda context: context.load_verify_locations(client_ca), client_ca)
    if material != read():  # what was tried is not what was read
        raise SettingsError(f"the certificate {certificate} was replaced while it was read; try again")
    return material


def _context(protocol: int, load: Callable[[ssl.SSLContext], None], path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    try:
        load(context)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"{path} is of no use for TLS: {_reason(error)}") from None
    return context


def _reason(error: OSError) -> str:
    """OpenSSL's words, without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return (error.strerror or str(error)).partition(" (_ssl")[0]


def _try(certificate: Path, key: Path) -> None:
    """A handshake in memory with a client that trusts this very certificate: it fits its key, is in date, is a server's.

    Raises SettingsError. Whether the client's own authority has signed it is the client's matter.
    """

    def load_key(context: ssl.SSLContext) -> None:
        context.load_cert_chain(certificate, key, password="")  # never ask a terminal for one

    server_context = _context(ssl.PROTOCOL_TLS_SERVER, load_key, certificate)
    client_context = _context(
        ssl.PROTOCOL_TLS_CLIENT, lambda context: context.load_verify_locations(certificate), certificate
    )
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    try:
        for _ in range(_HANDSHAKE_ROUNDS):
            for end in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLError as error:
        raise SettingsError(f"the certificate {certificate} is of no use: {_reason(error)}") from None
