"""What the scheduler, the RPC layer and the daemon know of an engine. `TorchEngine` and `FakeEngine` are the two."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from graphcache import GraphCache
from hotgraph_server.batch import Batch, EngineInfo, Sampler, StepKey, StepOutput


class Engine(Protocol):
    """Runs steps, in the order they are given. All methods are called from the event loop's thread."""

    @property
    def info(self) -> EngineInfo:
        """Valid once `start` returned."""
        ...

    @property
    def graphs(self) -> GraphCache[StepKey]:
        """The cache its steps go through. Valid once `start` returned."""
        ...

    async def start(self) -> None:
        """Loads the model and allocates everything with a name. Raises ModelLoadError."""
        ...

    def step(self, batch: Batch) -> Awaitable[StepOutput]:
        """Submits one step and returns at once; await the result. At most `info.run_ahead + 1` may be outstanding.

        Raises EngineFailedError from the awaitable when the engine is beyond use; every later step raises it too.
        """
        ...

    def bucket(self, num_tokens: int, num_rows: int, sampler: Sampler) -> StepKey | None:
        """The key of the smallest graph shape that holds such a step; None when no bucket is large enough."""
        ...

    async def close(self) -> None:
        """Ends its threads once the outstanding steps are done. May be called twice."""
        ...
