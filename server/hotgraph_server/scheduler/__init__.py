"""What runs next: admission, slots, blocks, steps, and the stream of each request."""

from hotgraph_server.scheduler.quarantine import open_quarantine
from hotgraph_server.scheduler.scheduler import Scheduler
from hotgraph_server.scheduler.selftest import self_test
from hotgraph_server.scheduler.status import KvCacheStatus, SchedulerStatus
from hotgraph_server.scheduler.stream import RequestStream

__all__ = ["KvCacheStatus", "RequestStream", "Scheduler", "SchedulerStatus", "open_quarantine", "self_test"]
