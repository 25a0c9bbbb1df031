"""Executables of recorded graphs: made, or updated from spares of destroyed ones, uploaded, and what they hold measured.

It knows neither how graphs are recorded nor whose turn it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from graphcache.backends.cuda_runtime import CudaCallError, Runtime
from graphcache.backends.cuda_sizes import ExecutableSizes
from graphcache.backends.cuda_spares import Executable, Shape, Spares
from graphcache.backends.cuda_torch import Torch
from graphcache.errors import CaptureError

log = logging.getLogger("graphcache")


class Launchable(NamedTuple):
    """An executable that is ready; `seconds` it took, pauses left out; and whether it is a spare that was updated."""

    executable: Executable
    seconds: float
    is_update: bool


class Executables:
    """Counts since the start: `num_updates` graphs took over a spare, `num_instantiates` made an executable."""

    def __init__(self, runtime: Runtime, torch_device: Torch, num_spares: int) -> None:
        self.num_updates = 0
        self.num_instantiates = 0
        self.spares = Spares(runtime, num_spares)
        self.sizes = ExecutableSizes()
        self._runtime = runtime
        self._torch = torch_device

    def __repr__(self) -> str:
        return f"{len(self.spares)} spares, {self.num_instantiates} instantiated, {self.num_updates} updated"

    def make(self, graph: int, stream: int, pause: Callable[[], None]) -> Launchable:
        """Of `graph`, uploaded on `stream`, which is waited for; `pause` is called between the phases.

        Raises CaptureError when the graph is empty, else what the runtime and `pause` raise, and then holds nothing.
        """
        shape = Shape.of(graph, self._runtime)
        if shape.num_nodes == 0:
            raise CaptureError("the work put nothing on the capture stream")
        started = perf_counter()
        spare = self.spares.take(graph, shape)
        seconds = perf_counter() - started
        handle, fallen_bytes = (spare.handle, 0) if spare is not None else (None, 0)
        try:
            if handle is None:
                before = self._unaccounted_bytes()
                started = perf_counter()
                handle = self._runtime.instantiate(graph)
                seconds += perf_counter() - started
                fallen_bytes = before - self._unaccounted_bytes()
            pause()
            before = self._unaccounted_bytes()
            started = perf_counter()
            self._runtime.upload(handle, stream)
            self._runtime.synchronize_stream(stream)
            seconds += perf_counter() - started
            fallen_bytes += before - self._unaccounted_bytes()
        except BaseException:
            if handle is not None:
                leave("an executable", self._runtime.destroy_executable, handle)
            raise
        if spare is not None:
            self.num_updates += 1
            return Launchable(spare, seconds, is_update=True)
        self.num_instantiates += 1
        made = Executable(handle, shape, self.sizes.measured(shape.num_nodes, fallen_bytes))
        return Launchable(made, seconds, is_update=False)

    def _unaccounted_bytes(self) -> int:
        """Free device memory, and what torch holds: what falls when somebody else takes memory, the driver for one."""
        return self._runtime.free_bytes() + self._torch.reserved_bytes()


def leave(what: str, destroy: Callable[[int], None], handle: int) -> None:
    """Destroys something. A failure is logged: nothing can be done about it, and it must not hide another."""
    try:
        destroy(handle)
    except CudaCallError:
        log.exception("%s of the CUDA backend was left behind", what)
