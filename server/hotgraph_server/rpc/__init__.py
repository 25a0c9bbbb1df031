"""Everything that speaks gRPC: a file a service, the wire, the statuses, and the server that puts them together."""

import os

# Read by gRPC when it is imported, so this comes before. Without its event engine, the thread that waits for the completions
# of calls also waits for the sockets: half as many threads are woken on a message's way. An older gRPC is so by default.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

from hotgraph_server.rpc.lifecycle import TRANSITIONS, DaemonState, Lifecycle, ServedModel
from hotgraph_server.rpc.server import RpcServer

__all__ = ["TRANSITIONS", "DaemonState", "Lifecycle", "RpcServer", "ServedModel"]
