"""Which graph a step runs with: the right one, a larger one, or none; and the receipt that says so. No tensors, no waiting."""

from __future__ import annotations

from typing import NamedTuple

from graphcache import Clock, Graph, GraphCache
from hotgraph_server.batch import Batch, StepKey, StepReceipt
from hotgraph_server.engine.buckets import Buckets


class Choice(NamedTuple):
    """How one step runs. `graph` is held until `finish`; None means eagerly. `tokens` and `rows` are what is computed."""

    key: StepKey | None
    graph: Graph[StepKey] | None
    tokens: int
    rows: int
    graph_age_seconds: float | None


class GraphChooser:
    """Looks steps up in the cache and tells the cache what came of it. One thread chooses, and one, maybe another, finishes.

    `is_padded`: a replay computes the whole shape of its graph. Else it computes the step's own shape, and no padding is
    reported.
    """

    def __init__(self, cache: GraphCache[StepKey], buckets: Buckets, clock: Clock, *, is_padded: bool) -> None:
        self._cache = cache
        self._buckets = buckets
        self._clock = clock
        self._is_padded = is_padded

    def choose(self, batch: Batch) -> Choice:
        """Takes hold of a graph for the batch, when one is ready.

        To be called before anything of the step is put on the device. Call `launched` when all of it is, and `finish` once it
        is done; or `abandon` at any time.
        """
        self._cache.step_launching()
        num_tokens, num_rows = batch.num_tokens, len(batch.rows)
        key = None if batch.is_eager else self._buckets.key(num_tokens, num_rows, batch.sampler)
        if key is None:
            return Choice(None, None, num_tokens, num_rows, None)
        graph = self._cache.acquire(key)
        if graph is None:
            larger = map(self._cache.acquire, self._buckets.larger(key))
            graph = next((found for found in larger if found is not None), None)
        if graph is None:
            self._cache.step_missing()
            return Choice(key, None, num_tokens, num_rows, None)
        age_seconds = max(0.0, self._clock.monotonic() - graph.publish_monotonic)
        if self._is_padded:
            num_tokens, num_rows = graph.key.tokens, graph.key.rows
        return Choice(key, graph, num_tokens, num_rows, age_seconds)

    def launched(self) -> None:
        """The step of the last choice is on its way."""
        self._cache.step_launched()

    def withdraw(self, choice: Choice, reason: str) -> Choice:
        """The choice's graph could not be launched: nobody gets it any more. Returns the same shape without a graph."""
        graph = choice.graph
        assert graph is not None
        self._cache.report_failure(graph, reason)
        graph.release()
        return Choice(choice.key, None, choice.tokens, choice.rows, None)

    def finish(self, batch: Batch, choice: Choice, seconds: float) -> StepReceipt:
        """Lets go of the graph, counts the hit or miss, and writes the receipt. `seconds`: what the step took."""
        graph = choice.graph
        self._cache.step_finished()
        if graph is not None:
            graph.release()
            self._cache.record_hit(graph, seconds)
            if choice.key is not None and graph.key != choice.key:
                self._cache.record_miss(choice.key)  # it served, but padded: the step's own graph would do better
        elif choice.key is not None:
            self._cache.record_miss(choice.key, seconds)
        return StepReceipt(
            phase=batch.phase,
            graph="" if graph is None else graph.name,
            num_tokens=batch.num_tokens,
            num_rows=len(batch.rows),
            tokens_bucket=choice.tokens,
            rows_bucket=choice.rows,
            graph_age_seconds=choice.graph_age_seconds,
            seconds=seconds,
        )

    def abandon(self, choice: Choice) -> None:
        """Lets go of the graph of a step that failed."""
        self._cache.step_finished()
        if choice.graph is not None:
            choice.graph.release()
