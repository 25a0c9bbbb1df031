"""A step's sampling with its kernels in Triton's interpreter. `test_sampler.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.batch import Sampler
from hotgraph_server.kernels.sample_triton import BLOCK_TOKENS
from tests.server.engine.sampler_checks import check_sample_step
from tests.server.kernels.interpreted_sample import use_logarithms_of_torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def logarithms_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_logarithms_of_torch(monkeypatch)


@pytest.mark.parametrize("sampler", [Sampler.GREEDY, Sampler.GUMBEL])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 9])
def test_sample_step(num_rows: int, sampler: Sampler) -> None:
    """Ring, slots and largest logits are those of torch, whatever the rows are."""
    for seed in range(2):
        check_sample_step(num_rows, BLOCK_TOKENS + 100 * num_rows, CPU, sampler, seed=10 * num_rows + seed)
