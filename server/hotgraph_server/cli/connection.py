"""The options that reach a daemon, and the client made from them. It knows which environment variables stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.units import parse_seconds

if TYPE_CHECKING:
    from hotgraph_client import Client

DEFAULT_TARGET = "unix:hotgraph.sock"

_PANEL = "Connection"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel="Output")]


def seconds(text: str | float | None) -> float | None:
    """A Typer parser of times such as 2, 150ms, 1.5s or 10min."""
    if text is None or isinstance(text, float):
        return text
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True)
class ConnectionOptions:
    """Where the daemon is, and how to prove who calls."""

    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            envvar="HOTGRAPH_TARGET",
            show_envvar=True,
            help="Address of the daemon: unix:PATH or HOST:PORT.",
            rich_help_panel=_PANEL,
        ),
    ] = DEFAULT_TARGET
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="Give up after this, such as 30s.", rich_help_panel=_PANEL),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", envvar="HOTGRAPH_TOKEN_FILE", help="File with the bearer token.", rich_help_panel=_PANEL
        ),
    ] = None
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt, trusting the system's authorities.", rich_help_panel=_PANEL)
    ] = False
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            envvar="HOTGRAPH_TLS_CA",
            help="Encrypt, trusting these PEM certificates.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", envvar="HOTGRAPH_TLS_CERT", help="PEM certificate to show.", rich_help_panel=_PANEL),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", envvar="HOTGRAPH_TLS_KEY", help="PEM key of --tls-cert.", rich_help_panel=_PANEL),
    ] = None
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            envvar="HOTGRAPH_TLS_SERVER_NAME",
            help="Name to expect in the daemon's certificate.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def client(self) -> Client:
        """A client of that daemon. Connects when first used. Raises CommandError when a file cannot be read."""
        from hotgraph_client import Client, TlsConfig

        token = None if self.token_file is None else _read(self.token_file, "token").decode().strip()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise CommandError("--tls-cert and --tls-key go together", ExitStatus.USAGE)
        tls: bool | TlsConfig | None = self.tls or None
        if self.tls_ca or self.tls_cert or self.tls_server_name:
            tls = TlsConfig(
                root_certificates=None if self.tls_ca is None else _read(self.tls_ca, "certificate"),
                private_key=None if self.tls_key is None else _read(self.tls_key, "key"),
                certificate_chain=None if self.tls_cert is None else _read(self.tls_cert, "certificate"),
                server_name=self.tls_server_name,
            )
        try:
            return Client(self.target, token=token, tls=tls, timeout=seconds(self.timeout))
        except ValueError as error:
            raise CommandError(f"no connection can be made so: {error}", ExitStatus.USAGE) from None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"the {what} file {path} cannot be read: {error.strerror}", ExitStatus.SETTINGS) from None
