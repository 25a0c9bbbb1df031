"""The command line. `main` is the console script; it works, and says what is missing, with the base install alone."""

from __future__ import annotations

import sys

__all__ = ["main"]

_MISSING_EXTRA_STATUS = 69  # EX_UNAVAILABLE: something needed is not installed


def main() -> None:
    """Runs the command line on sys.argv and ends the process with its exit status."""
    try:
        import rich  # noqa: F401  # asked for here so that its absence is told apart from an error of ours
        import typer  # noqa: F401  # likewise
    except ModuleNotFoundError:
        sys.stderr.write("hotgraph: the command line is not installed: pip install 'hotgraph[cli]'\n")
        raise SystemExit(_MISSING_EXTRA_STATUS) from None
    from hotgraph_server.cli.app import run

    run()
