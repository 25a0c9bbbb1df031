"""Who may come in: how much may wait, what the context holds, and which graphs must be there first."""

from __future__ import annotations

from graphcache import GraphState, Priority
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.config import SchedulerSettings
from hotgraph_server.engine.interface import Engine
from hotgraph_server.errors import ContextLengthError, GraphNotReadyError, NotPossibleError, QueueFullError
from hotgraph_server.request import GraphMode, Request
from hotgraph_server.scheduler.sampler import sampler_of

MIN_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 30.0


class Admission:
    """The rules a request must pass on arrival. Knows how long sequences take, to tell the refused when to come back."""

    def __init__(self, engine: Engine, settings: SchedulerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._sequence_seconds = 1.0  # moving average of the time a sequence holds its slot

    def apply(self, settings: SchedulerSettings) -> None:
        """Takes over max_waiting."""
        self._settings = settings

    def check_fits(self, request: Request) -> None:
        """Raises ContextLengthError when prompt and completion exceed the context."""
        limit = self._engine.info.context_length
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens + request.max_tokens > limit:
            raise ContextLengthError(limit=limit, prompt_tokens=num_prompt_tokens, max_tokens=request.max_tokens)

    def num_missing(self, num_new: int, *, num_running: int, num_waiting: int) -> int:
        """How many places slots and queue lack for so many more sequences; 0 or less: there is room."""
        return num_running + num_waiting + num_new - self._engine.info.num_slots - self._settings.max_waiting

    def queue_full(self, num_waiting: int, *, gives_way: bool = False) -> QueueFullError:
        """What who finds no place is told. `gives_way`: they had one, and somebody of whom less waits has it now."""
        told = "and most of them are this caller's: others come first" if gives_way else "already"
        return QueueFullError(
            f"{num_waiting} sequences wait {told}, {self._settings.max_waiting} may",
            retry_after_seconds=self.retry_after_seconds(num_waiting),
        )

    def retry_after_seconds(self, num_waiting: int) -> float:
        """When a place in the queue is likely to be free: the time the engine needs for one sequence of those it runs."""
        seconds = self._sequence_seconds / self._engine.info.num_slots * max(1, num_waiting // 4)
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, seconds))

    def note_sequence(self, seconds: float) -> None:
        """Learns how long a sequence held its slot."""
        self._sequence_seconds += 0.1 * (seconds - self._sequence_seconds)

    def check_graphs(self, request: Request) -> None:
        """For GraphMode.REQUIRE: raises GraphNotReadyError, having asked for the captures, when a graph is missing.

        Raises NotPossibleError when no bucket is large enough, or a graph is quarantined and will not come.
        """
        if request.graph_policy.mode is not GraphMode.REQUIRE:
            return
        missing = self.missing_graphs(request)
        if not missing:
            return
        cache = self._engine.graphs
        for key in missing:
            if cache.request(key, Priority.WAITED).state is GraphState.QUARANTINED:
                raise NotPossibleError(f"graph {key} gave wrong results and is quarantined")
        raise GraphNotReadyError(
            "graphs the request requires are not captured yet",
            retry_after_seconds=min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, *map(cache.estimate_seconds, missing))),
            metadata={"graphs": ",".join(map(str, missing))},
        )

    def missing_graphs(self, request: Request) -> list[StepKey]:
        """The graphs that the request needs when it runs by itself and that do not serve yet."""
        engine = self._engine
        shapes = self._shapes(request)
        keys = {engine.bucket(*shape): shape for shape in shapes}
        if None in keys:
            tokens, rows, sampler = keys[None]
            raise NotPossibleError(
                f"no graph is large enough for a step of {tokens} tokens, {rows} rows, {sampler.value}"
            )
        return [key for key in keys if key is not None and engine.graphs.lookup(key) is None]

    def _shapes(self, request: Request) -> list[tuple[int, int, Sampler]]:
        """Steps of the request alone: whole chunks of its prompt, the last chunk, one decode row."""
        num_tokens = len(request.prompt_token_ids)
        chunk = self._engine.info.max_step_tokens
        sampler = sampler_of(request, bans_stops=request.stop.min_tokens > 0)
        shapes = [(chunk, 1, Sampler.GREEDY)] if num_tokens > chunk else []
        shapes.append((num_tokens % chunk or min(num_tokens, chunk), 1, sampler))
        if request.max_tokens > 1:
            shapes.append((1, 1, sampler))
        return shapes
