"""Steps written to the ring of stages, read by an NVIDIA GPU out of the host's memory while the host writes the next ones."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.engine.state import StepState
from tests.server.engine.stage_checks import MAX_ROWS, MAX_TOKENS, check_steps, work

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
SLEEP_CYCLES = 300_000  # some 0.2 ms: longer than the host takes for a step, so that it really is ahead
SHAPES = ((1, 1), (MAX_ROWS, MAX_ROWS), (MAX_TOKENS, 1), (MAX_TOKENS, MAX_ROWS))


def slowly(state: StepState, tokens: int, rows: int) -> None:
    """The step begins long after it was launched."""
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    work(state, tokens, rows)


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_every_step_reads_its_own(num_ahead: int) -> None:
    """Slots assigned anew, tables that grow, and steps of all shapes are read as filled in, with no stage to spare."""
    for seed in range(3):
        check_steps(CUDA, seed=seed, num_steps=200, num_ahead=num_ahead)
        check_steps(CUDA, seed=seed, num_steps=200, num_ahead=num_ahead, run=slowly)


class Replayed:
    """Runs steps as replays of a graph that was captured from the first one, in its shape."""

    def __init__(self, *, is_slow: bool) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_slow = is_slow

    def __call__(self, state: StepState, tokens: int, rows: int) -> None:
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                work(state, tokens, rows)
        if self._is_slow:
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        self._graph.replay()


@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "host ahead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_reads_each_step_anew(shape: tuple[int, int], is_slow: bool) -> None:
    """One graph gives hundreds of steps what was filled in for each, slots assigned anew between them."""
    for num_ahead in (0, 1, 3):
        check_steps(CUDA, seed=1, num_steps=5, num_ahead=num_ahead)  # compiles: nothing may be in a capture
        run = Replayed(is_slow=is_slow)
        check_steps(CUDA, seed=num_ahead, num_steps=300, num_ahead=num_ahead, run=run, shape=shape)
