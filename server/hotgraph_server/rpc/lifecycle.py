"""Where the daemon stands in its life, and what is served once the model is loaded. It decides which calls may pass."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hotgraph_server.batch import EngineInfo
from hotgraph_server.engine.interface import Engine
from hotgraph_server.errors import DrainingError, HotgraphError, LoadingError, ModelNotFoundError
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.text import Tokenizer

LOADING_RETRY_SECONDS = 1.0
DRAINING_RETRY_SECONDS = 1.0


class DaemonState(enum.Enum):
    """The daemon's life."""

    STARTING = "starting"  # listens, loads the model
    SERVING = "serving"
    DRAINING = "draining"  # finishes what runs, admits no more
    STOPPED = "stopped"


TRANSITIONS: dict[DaemonState, frozenset[DaemonState]] = {
    DaemonState.STARTING: frozenset({DaemonState.SERVING, DaemonState.DRAINING, DaemonState.STOPPED}),
    DaemonState.SERVING: frozenset({DaemonState.DRAINING, DaemonState.STOPPED}),  # STOPPED: the engine failed
    DaemonState.DRAINING: frozenset({DaemonState.STOPPED}),
    DaemonState.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """All that answering needs. The engine is started and the scheduler runs."""

    model_id: str
    engine: Engine
    tokenizer: Tokenizer
    scheduler: Scheduler

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def check_name(self, name: str) -> None:
        """Raises ModelNotFoundError unless `name` is empty, this model's id, or its resource name."""
        if name and name.removeprefix("models/") != self.model_id:
            raise ModelNotFoundError(name)


class Lifecycle:
    """The state, and the model while there is one. Event loop's thread only."""

    def __init__(self) -> None:
        self._state = DaemonState.STARTING
        self._served: ServedModel | None = None
        self._failure: HotgraphError | None = None

    def __repr__(self) -> str:
        return f"<Lifecycle {self._state.value}>"

    @property
    def state(self) -> DaemonState:
        return self._state

    @property
    def served(self) -> ServedModel | None:
        """The model, from the end of loading on, whatever the state."""
        return self._served

    @property
    def failure(self) -> HotgraphError | None:
        """Why the daemon stopped by itself; None when it did not."""
        return self._failure

    def move(self, state: DaemonState) -> None:
        """Raises ValueError for what is not in the table."""
        if state not in TRANSITIONS[self._state]:
            raise ValueError(f"the daemon does not go from {self._state.value} to {state.value}")
        self._state = state

    def serve(self, served: ServedModel) -> None:
        """The model is ready: calls pass from now on."""
        self.move(DaemonState.SERVING)
        self._served = served

    def fail(self, error: HotgraphError) -> None:
        """Calls are refused with `error` from now on. The first failure counts."""
        if self._failure is None:
            self._failure = error

    def require(self) -> ServedModel:
        """The model, for a new call. Raises what a call is refused with now: loading, draining, or the failure."""
        if self._failure is not None:
            raise self._failure
        if self._state in (DaemonState.DRAINING, DaemonState.STOPPED):
            raise DrainingError("the server is stopping", retry_after_seconds=DRAINING_RETRY_SECONDS)
        if self._served is None:
            raise LoadingError("the model is being loaded", retry_after_seconds=LOADING_RETRY_SECONDS)
        return self._served
