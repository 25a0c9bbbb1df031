"""One graph that was captured, as the cache holds it: launchable, until its executable is handed back. It makes nothing."""

from __future__ import annotations

from collections.abc import Callable

from graphcache.backends.cuda_spares import Executable
from graphcache.errors import GraphStateError


class CudaCaptured:
    """One graph, launchable. `size_bytes`: its executable's share, and what the pool grew by while it was recorded.

    `num_nodes`, `num_edges` and `num_programmatic_edges` (whose second kernel may start before the first one ends) are the
    recorded graph's. `retire` takes the executable back.
    """

    def __init__(
        self,
        executable: Executable,
        replay: Callable[[], None],
        retire: Callable[[Executable], None],
        *,
        pool_bytes: int,
        record_seconds: float,
        instantiate_seconds: float,
        is_update: bool,
    ) -> None:
        self.replay: Callable[[], None] = replay
        self.size_bytes = executable.size_bytes + pool_bytes
        self.record_seconds = record_seconds
        self.instantiate_seconds = instantiate_seconds  # or update; and upload
        self.is_update = is_update
        self.num_nodes = executable.shape.num_nodes
        self.num_edges = len(executable.shape.edge_types)
        self.num_programmatic_edges = executable.shape.num_programmatic_edges
        self._retire = retire
        self._executable: Executable | None = executable

    def __repr__(self) -> str:
        return f"CudaCaptured({self.num_nodes} nodes, {self.size_bytes} bytes)"

    def destroy(self) -> None:
        """Hands the executable back, to be updated or destroyed. Its last launch may still run. Raises GraphStateError."""
        if self._executable is None:
            raise GraphStateError("the graph was destroyed before")
        executable, self._executable = self._executable, None
        self.replay = _gone
        self._retire(executable)


def _gone() -> None:
    raise GraphStateError("a destroyed graph was replayed")
