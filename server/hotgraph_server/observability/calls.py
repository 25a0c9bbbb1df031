"""What the calls of our services add up to: by method, code and reason, all of which are ours and few."""

from __future__ import annotations

from collections import Counter

from hotgraph_server.observability.distribution import Distribution
from hotgraph_server.observability.requests import distribution
from hotgraph_server.rpc.call import Call


class CallMetrics:
    """One of the guard's observers. Event loop's thread only."""

    def __init__(self) -> None:
        self.num_calls: Counter[tuple[str, str]] = Counter()  # by method and code
        self.num_errors: Counter[str] = Counter()  # by reason
        self.durations: dict[str, Distribution] = {}  # by method

    def call_begun(self, call: Call) -> None:
        """Nothing: calls under way are counted by the guard."""

    def call_ended(self, call: Call) -> None:
        """Methods are those that are served: the guard sees no others."""
        method = call.method.rpartition("/")[2]
        self.num_calls[method, call.code] += 1
        if call.reason:
            self.num_errors[call.reason] += 1
        duration = self.durations.get(method)
        if duration is None:
            duration = self.durations[method] = distribution("hotgraph_rpc_duration_seconds")
        duration.add(call.seconds)
