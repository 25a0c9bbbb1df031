"""What replays of step graphs take on the device itself, without tracing: events on the serving stream around each launch.

Two events a step cost the host some microseconds. While steps follow each other the first one fires when the step before is
over, so a time is from the end of one step to the end of the next; of a lone step it begins some microseconds before the first
kernel. Without a GPU a replay is the work itself, and is timed on the host.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.service import Service


class DeviceTimes:
    """Seconds of replays by the graph's name, in the order of their launch. Made by `measuring`, complete when that ends."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)


@contextlib.contextmanager
def measuring(service: Service) -> Iterator[DeviceTimes]:
    """Meanwhile every replay of the engine is timed. Nothing may be under way at the begin or the end."""
    engine: Any = service.engine
    times = DeviceTimes()
    events: list[tuple[str, Any, Any]] = []
    replay: Callable[[Any], bool] = engine._replay
    is_cuda = torch.device(service.engine.info.device).type == "cuda"

    def on_device(graph: Any) -> bool:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        is_launched = replay(graph)
        end.record()
        if is_launched:
            events.append((graph.name, begin, end))
        return is_launched

    def on_host(graph: Any) -> bool:
        begin_seconds = time.perf_counter()
        is_launched = replay(graph)
        times.seconds[graph.name].append(time.perf_counter() - begin_seconds)
        return is_launched

    engine._replay = on_device if is_cuda else on_host
    try:
        yield times
    finally:
        engine._replay = replay
        for name, begin, end in tuple(events):  # a step that nobody waits for any more may still be launched
            end.synchronize()
            times.seconds[name].append(begin.elapsed_time(end) / 1e3)
