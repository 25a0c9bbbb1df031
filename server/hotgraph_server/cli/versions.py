"""`hotgraph version` and `--version`: what is installed."""

from __future__ import annotations

import platform
import sys

import typer

from hotgraph_server.cli.connection import JsonFlag
from hotgraph_server.cli.output import console, print_json, table

_PACKAGES = ("grpcio", "protobuf", "torch", "transformers", "typer", "rich")


def package_version(name: str) -> str | None:
    """The installed version of a package; None when it is not installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


def print_version(is_wanted: bool) -> None:
    """What --version does."""
    if is_wanted:
        sys.stdout.write(f"hotgraph {package_version('hotgraph') or 'not installed'}\n")
        raise typer.Exit


def version(as_json: JsonFlag = False) -> None:
    """Print the versions of hotgraph and of what it runs on.

    Keys of --json: hotgraph, python, platform, packages (name to version or null). A daemon's own: hotgraph status.
    """
    versions = {name: package_version(name) for name in _PACKAGES}
    if as_json:
        print_json(
            {
                "hotgraph": package_version("hotgraph"),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "packages": versions,
            }
        )
        return
    rows = table(["package", "version"])
    rows.add_row("hotgraph", package_version("hotgraph") or "not installed")
    rows.add_row("python", platform.python_version())
    for name, found in versions.items():
        rows.add_row(name, found or "not installed")
    console().print(rows)
