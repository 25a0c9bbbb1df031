"""The fused samplers where there is no GPU: interpreted they give what torch gives, and they compile for one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hotgraph_server.kernels.sample_triton import BlockResults, sample_plain_triton
from tests.server.kernels.compiler import compile_launches, spills
from tests.server.kernels.interpreter import run_interpreted
from tests.server.kernels.sample_checks import draw_step

CPU = torch.device("cpu")


def test_interpreted_kernels_give_what_torch_gives() -> None:
    """Every check of `interpreted_sample.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_sample.py"))


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "gumbel"])
@pytest.mark.parametrize("vocabulary_size", [128256, 50257])
def test_two_compiled_kernels_serve_every_step(
    vocabulary_size: int, is_greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an H200 both compile without running out of registers, rows choose no other variant, and no product is fused."""
    kernels = compile_launches(monkeypatch)
    step = draw_step(random.Random(1), 100, CPU)
    blocks = BlockResults.allocate(step.values.shape[1], vocabulary_size, CPU)
    logits = torch.empty(100, vocabulary_size, dtype=torch.float16)
    for num_rows in (1, 2, 16, 100):
        sample_plain_triton(logits[:num_rows], step, blocks, is_greedy=is_greedy)
    assert len(kernels) == 8
    assert len({kernel.hash for kernel in kernels}) == 2
    assert not any(map(spills, kernels[:2]))
    # Sums and products that may not be put together say how they round.
    assert ("mul.rn.f32" in kernels[0].asm["ptx"]) != is_greedy
    assert "mul.f32" not in kernels[0].asm["ptx"]
    assert "add.f32" not in kernels[0].asm["ptx"]


def test_what_does_not_fit_is_refused() -> None:
    """Too few rows, another vocabulary, rows that are not dense and a beginning that would choose another variant."""
    step = draw_step(random.Random(2), 4, CPU)
    blocks = BlockResults.allocate(4, 3000, CPU)
    for logits in (torch.zeros(5, 3000), torch.zeros(4, 5000)):
        with pytest.raises(ValueError, match="room for"):
            sample_plain_triton(logits, step, blocks, is_greedy=True)
    for logits in (torch.zeros(3000, 4).t(), torch.zeros(4, 3001)[:, 1:]):
        with pytest.raises(ValueError, match="dense rows"):
            sample_plain_triton(logits, step, blocks, is_greedy=True)
