"""The fused samplers in Triton's interpreter, on the CPU. `test_sample_triton.py` runs this file in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import interpreter  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels import sample_triton
from hotgraph_server.kernels.sample_triton import BLOCK_TOKENS, BlockResults, sample_plain_triton
from tests.server.kernels import sample_checks

CPU = torch.device("cpu")


def use_logarithms_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no functions of NVIDIA's library. NumPy's logarithms differ from torch's in the last place."""

    def elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
        def apply(x: Any) -> Any:
            data = function(torch.from_numpy(x.handle.data)).numpy()
            return tl.core.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

        return apply

    library = SimpleNamespace(log=elementwise(torch.log), log1p=elementwise(torch.log1p))
    monkeypatch.setattr(sample_triton, "libdevice", library)


@pytest.fixture(autouse=True)
def logarithms_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_logarithms_of_torch(monkeypatch)


def test_noise() -> None:
    """It is that of `noise.py`."""
    sample_checks.check_noise(4, CPU, seed=1)


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "gumbel"])
@pytest.mark.parametrize("num_rows", range(1, 10))
def test_sample_plain(num_rows: int, is_greedy: bool) -> None:
    """One block that is not full, blocks that are, and a last one of few tokens; logits of 16 and 32 bits."""
    sizes = ((5, BLOCK_TOKENS + 1), (BLOCK_TOKENS, 3 * BLOCK_TOKENS - 7))[num_rows % 2]
    for index, vocabulary_size in enumerate(sizes):
        dtype = sample_checks.DTYPES[(num_rows + index) % 3]
        seed = num_rows * 10 + index
        sample_checks.check_sample_plain(num_rows, vocabulary_size, dtype, CPU, is_greedy=is_greedy, seed=seed)


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "gumbel"])
def test_the_smallest_of_equal_tokens_wins(is_greedy: bool) -> None:
    """Two tokens in different blocks have one score, so far above the others' that they stay equal with noise."""
    rng = random.Random(1)
    step = sample_checks.draw_step(rng, 1, CPU, max_rows=1)
    blocks = BlockResults.allocate(1, 4 * BLOCK_TOKENS, CPU)
    logits = torch.randn(1, 4 * BLOCK_TOKENS)
    places = sorted(rng.sample(range(4 * BLOCK_TOKENS), 3))
    logits[0, places] = 1e30
    step.temperature.fill_(0.5)
    place = int(step.counter) % sample_checks.DEPTH
    sample_plain_triton(logits, step, blocks, is_greedy=is_greedy)
    assert step.ring_ids[place, 1] == places[0]


def test_a_row_alone_and_among_others_gives_one_token() -> None:
    """Whatever its neighbours are, failed ones among them."""
    rng = random.Random(2)
    step = sample_checks.draw_step(rng, 6, CPU, max_rows=6)
    vocabulary_size = BLOCK_TOKENS + 300
    blocks = BlockResults.allocate(6, vocabulary_size, CPU)
    logits = torch.randn(6, vocabulary_size)
    logits[1, 7], logits[4, 1100] = torch.nan, torch.inf
    place = int(step.counter) % sample_checks.DEPTH
    sample_plain_triton(logits, step, blocks, is_greedy=False)
    together = step.ring_ids[place, 1:].tolist()
    assert [token for token in together if token < 0] == [together[1], together[4]] == [-1, -1]
    for row in range(6):
        alone = sample_checks.copied(step)
        alone.row_slots[0], alone.context_lens[0] = step.row_slots[row], step.context_lens[row]
        place = int(alone.counter) % sample_checks.DEPTH
        sample_plain_triton(logits[row : row + 1].clone(), alone, blocks, is_greedy=False)
        assert alone.ring_ids[place, 1] == together[row]
