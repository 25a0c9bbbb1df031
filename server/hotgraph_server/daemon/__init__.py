"""The daemon: builds the parts, listens, loads, serves, drains, stops. The only room that knows all of them."""

from hotgraph_server.daemon.daemon import Daemon
from hotgraph_server.daemon.exit_status import ExitStatus
from hotgraph_server.daemon.parts import BuildParts, Parts, build_parts
from hotgraph_server.daemon.process import run, serve
from hotgraph_server.rpc import TRANSITIONS, DaemonState

__all__ = [
    "TRANSITIONS",
    "BuildParts",
    "Daemon",
    "DaemonState",
    "ExitStatus",
    "Parts",
    "build_parts",
    "run",
    "serve",
]
