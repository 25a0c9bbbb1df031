"""What hotgraph knows of systemd: the notify protocol, and the unit files that come with the package."""

from hotgraph_server.systemd.notify import Notifier

__all__ = ["Notifier"]
