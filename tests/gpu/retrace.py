"""Every step that an engine ran, run once more eagerly: the same kernels on the same batches, and so the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphcache import EagerBackend
from hotgraph_server.batch import Batch, Sampler, StepKey, StepOutput
from hotgraph_server.engine import TorchEngine
from hotgraph_server.engine.replay import Choice
from hotgraph_server.engine.state import StepState
from hotgraph_server.models.interface import Model
from tests.gpu.serving import Loaded, settings_of


@dataclass(frozen=True)
class TracedStep:
    """A batch, the shape that was computed for it, the graph that did so, and the tokens that came of it."""

    batch: Batch
    tokens: int
    rows: int
    graph: StepKey | None
    token_ids: Sequence[int | None]


def trace(engine: TorchEngine) -> list[TracedStep]:
    """The steps of an engine that has run none yet, in their order, as they come."""
    steps: list[TracedStep] = []
    read: Callable[..., StepOutput] = engine._read

    def traced(batch: Batch, choice: Choice, *others: Any) -> StepOutput:
        graph = None if choice.graph is None else choice.graph.key
        output = read(batch, choice, *others)
        steps.append(TracedStep(batch, choice.tokens, choice.rows, graph, output.token_ids))
        return output

    engine._read = traced  # type: ignore[method-assign,assignment]
    return steps


async def retrace(model: Model, steps: Sequence[TracedStep], **options: Any) -> None:
    """Runs the steps on a new engine without graphs, and compares every token. `options`: those of the traced service.

    Raises AssertionError for the first step that differs, and says whether it does so each time.
    """
    found = await _first_difference(model, steps, options)
    if found is not None:
        raise AssertionError(f"{found}; once more: {await _first_difference(model, steps, options)}")


async def _first_difference(model: Model, steps: Sequence[TracedStep], options: dict[str, Any]) -> str | None:
    """In words, or None."""
    engine = TorchEngine(Loaded(model), settings_of(**options), backend=EagerBackend(), run_ahead=0)
    await engine.start()
    step = steps[0]
    choose, run = engine._chooser.choose, engine._program.run

    def choose_traced(batch: Batch) -> Choice:
        return choose(replace(batch, is_eager=True))._replace(tokens=step.tokens, rows=step.rows)

    def run_traced(state: StepState, tokens: int, rows: int, sampler: Sampler) -> None:
        graph = step.graph
        run(state, tokens, rows, sampler if graph is None else graph.sampler, is_fixed=graph is not None)

    engine._chooser.choose = choose_traced  # type: ignore[method-assign]
    engine._program.run = run_traced  # type: ignore[method-assign,assignment]
    try:
        for index, step in enumerate(steps):
            output = await engine.step(step.batch)
            rows = zip(step.batch.rows, output.token_ids, step.token_ids, strict=True)
            different = [
                (row.slot, row.start, row.num_tokens, ours, theirs) for row, ours, theirs in rows if ours != theirs
            ]
            if different:
                shape = f"{step.batch.num_tokens} tokens of {len(step.batch.rows)} rows as ({step.tokens}, {step.rows})"
                return f"step {index} of {len(steps)}, {shape}, {step.graph}: (slot, start, tokens, eager, then) {different}"
    finally:
        await engine.close()
    return None
