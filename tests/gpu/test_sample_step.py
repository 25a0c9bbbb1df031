"""A step's sampling on an NVIDIA GPU: with its kernels, eagerly and in a graph, it does what torch's operations do there."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.batch import Sampler
from hotgraph_server.engine.state import StepState
from tests.server.engine.sampler_checks import check_sample_step, make_state, run_eagerly

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
VOCABULARIES = (32000, 49152)
SAMPLERS = (Sampler.GREEDY, Sampler.GUMBEL)


def test_buffers_on_a_gpu_have_kernels() -> None:
    """They are made for them at once, without being asked."""
    assert make_state(4, 4, 1000, CUDA).buffers.plain is not None


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 17, 33, 64])
@pytest.mark.parametrize("vocabulary_size", VOCABULARIES)
def test_sample_step(vocabulary_size: int, num_rows: int, sampler: Sampler) -> None:
    """Ring, slots and largest logits are those of torch to the bit, with rows that fail, are not sampled or are padding."""
    for seed in range(3):
        check_sample_step(num_rows, vocabulary_size, CUDA, sampler, seed=100 * num_rows + seed)


def run_dense(logits: torch.Tensor, state: StepState, sampler: Sampler) -> None:
    """Rows stand side by side, as in all graphs below."""
    run_eagerly(logits.clone(memory_format=torch.contiguous_format), state, sampler)


class Captured:
    """Runs a step as a replay of a graph, captured at its first use; filtered ones eagerly."""

    def __init__(self, num_rows: int, vocabulary_size: int) -> None:
        self._logits = torch.zeros(num_rows, vocabulary_size, device=CUDA)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, logits: torch.Tensor, state: StepState, sampler: Sampler) -> None:
        if sampler is Sampler.FILTERED:
            run_eagerly(logits, state, sampler)
            return
        self._logits.copy_(logits)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                run_eagerly(self._logits, state, sampler)
        self._graph.replay()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("vocabulary_size", VOCABULARIES)
def test_in_a_graph(vocabulary_size: int, sampler: Sampler) -> None:
    """After one eager step of three rows, graphs of any number of rows can be captured, and replay with fresh rows."""
    check_sample_step(3, vocabulary_size, CUDA, sampler, seed=1, max_rows=64, run=run_dense)
    for num_rows in (1, 16, 64):
        run = Captured(num_rows, vocabulary_size)
        check_sample_step(num_rows, vocabulary_size, CUDA, sampler, seed=num_rows, max_rows=64, run=run)
