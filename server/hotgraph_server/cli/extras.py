"""Which parts of the installation are there. It asks without importing, which for some of them takes seconds."""

from __future__ import annotations

import importlib.util

from hotgraph_server.cli.failures import CommandError, ExitStatus

# One module of each package that the daemon cannot start without.
SERVER_MODULES = (
    "pydantic",
    "structlog",
    "platformdirs",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "uvloop",
    "grpc_health",
    "grpc_reflection",
)


def missing_server_modules() -> list[str]:
    """Which of them are not installed."""
    return [name for name in SERVER_MODULES if importlib.util.find_spec(name) is None]


def require_server(what: str) -> None:
    """Raises CommandError that says what to install when `what` cannot run with what is installed."""
    missing = missing_server_modules()
    if missing:
        raise CommandError(
            f"{what} needs more than is installed: pip install 'hotgraph[server]' (missing: {', '.join(missing)})",
            ExitStatus.UNAVAILABLE,
        )
