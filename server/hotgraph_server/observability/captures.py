"""How long captures take, part by part, from the cache's own events. Counts of captures are the cache's."""

from __future__ import annotations

from typing import Final

from graphcache import Event, EventType
from hotgraph_server.batch import StepKey
from hotgraph_server.observability.requests import distribution

PARTS: Final = ("queue", "record", "instantiate", "verify")


class CaptureMetrics:
    """A listener of a graph cache."""

    def __init__(self) -> None:
        self.durations = {part: distribution("hotgraph_graph_capture_seconds") for part in PARTS}

    def on_event(self, event: Event[StepKey]) -> None:
        """On the thread that made the event, one at a time; a reader on another may see a capture half counted."""
        if event.type is not EventType.PUBLISHED or event.graph is None or event.graph.capture is None:
            return
        timings = event.graph.capture
        self.durations["queue"].add(timings.queue_seconds)
        self.durations["record"].add(timings.record_seconds)
        self.durations["instantiate"].add(timings.instantiate_seconds)
        self.durations["verify"].add(timings.verify_seconds)
