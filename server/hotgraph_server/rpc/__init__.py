"""Everything that speaks gRPC: a file a service, the wire, the statuses, and the server that puts them together."""

from hotgraph_server.rpc.lifecycle import TRANSITIONS, DaemonState, Lifecycle, ServedModel
from hotgraph_server.rpc.server import RpcServer

__all__ = ["TRANSITIONS", "DaemonState", "Lifecycle", "RpcServer", "ServedModel"]
