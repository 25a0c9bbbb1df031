"""Executables of destroyed graphs, kept to be updated by later captures of the same topology. It knows the runtime, no keys.

An update takes microseconds where an instantiate takes milliseconds, and memory of a destroyed executable comes back late.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphcache.backends.cuda_runtime import PROGRAMMATIC, Runtime


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a graph's topology is compared here: an update need not notice that an edge is of another type, and two chains of
    as many kernels may differ in nothing else."""

    num_nodes: int
    edge_types: tuple[int, ...]

    @classmethod
    def of(cls, graph: int, runtime: Runtime) -> Shape:
        """Raises CudaCallError."""
        return cls(runtime.num_nodes(graph), runtime.edge_types(graph))

    @property
    def num_programmatic_edges(self) -> int:
        """After which the second kernel may start before the first one ends (programmatic dependent launch)."""
        return self.edge_types.count(PROGRAMMATIC)


@dataclass(frozen=True, slots=True)
class Executable:
    """An instantiated graph: its handle, its shape, and what it holds of device memory."""

    handle: int
    shape: Shape
    size_bytes: int


class Spares:
    """At most `max_spares` of them, newest last. All but `all` is for the capture thread."""

    def __init__(self, runtime: Runtime, max_spares: int) -> None:
        """Raises ValueError for a negative number."""
        if max_spares < 0:
            raise ValueError(f"num_spare_execs is not negative: {max_spares}")
        self._runtime = runtime
        self._max_spares = max_spares
        self._spares: list[Executable] = []

    def __len__(self) -> int:
        return len(self._spares)

    def all(self) -> tuple[Executable, ...]:
        """From any thread."""
        return tuple(self._spares)

    def add(self, executable: Executable) -> None:
        """Nobody launches it any more; its last launch may still run. Raises CudaCallError when one too many cannot go."""
        self._spares.append(executable)
        while len(self._spares) > self._max_spares:
            self._runtime.destroy_executable(self._spares.pop(0).handle)

    def take(self, graph: int, shape: Shape) -> Executable | None:
        """One that does what `graph` does from its next launch on; no spare any more. None when none can.

        Those of the same shape are tried, newest first: the driver alone knows whether the rest agrees. One that was refused
        stays: it is launched only after an update that succeeded, which sets all there is to set. Raises CudaCallError.
        """
        for index in reversed(range(len(self._spares))):
            spare = self._spares[index]
            if spare.shape == shape and self._runtime.update(spare.handle, graph):
                del self._spares[index]
                return spare
        return None

    def clear(self) -> list[Executable]:
        """Takes all out."""
        spares, self._spares = self._spares, []
        return spares
