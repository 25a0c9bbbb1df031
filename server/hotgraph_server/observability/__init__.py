"""What the daemon tells of itself to monitoring: metrics and traces. It reads the other rooms, and changes nothing in them."""

from hotgraph_server.observability.observability import Observability

__all__ = ["Observability"]
