"""Sampling of a step: its kernels change nothing but the time, and are used where they can be."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.batch import Sampler
from tests.server.engine.sampler_checks import assert_same, draw_batch, fill, make_state, run_eagerly
from tests.server.kernels.compiler import compile_launches
from tests.server.kernels.interpreter import run_interpreted
from tests.server.kernels.sample_checks import draw_logits

CPU = torch.device("cpu")
ROWS = 5


def test_interpreted_kernels_do_what_torch_does() -> None:
    """Every check of `interpreted_sampler.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_sampler.py"))


def test_a_warm_up_compiles_all_that_a_capture_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step a sampler on the shadow, which has no slots, compiles the kernels of the served state's steps of all rows."""
    kernels = compile_launches(monkeypatch)
    vocabulary_size = 50257  # rows begin at addresses of all kinds
    shadow, live = (make_state(num_slots, 37, vocabulary_size, CPU) for num_slots in (0, 37))
    logits = torch.zeros(37, vocabulary_size)
    steps = [(shadow, 1), *((live, num_rows) for num_rows in (1, 2, 16, 17, 37))]
    hashes = []
    for state, num_rows in steps:
        state.buffers.plain = state.buffers.plain_sampling()
        for sampler in (Sampler.GREEDY, Sampler.GUMBEL):
            run_eagerly(logits[:num_rows], state, sampler)
        hashes.append([kernel.hash for kernel in kernels])
        kernels.clear()
    first = hashes[0]
    assert len(first) == 4
    assert first[1] == first[3], "both samplers end a step with one kernel"
    assert len(set(first)) == 3
    assert hashes == [first] * len(steps)


def in_columns(logits: torch.Tensor) -> torch.Tensor:
    """The same numbers, of which those of a column stand side by side."""
    return logits.t().contiguous().t()


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """The same numbers, at an address that is no multiple of 16."""
    room = torch.empty(logits.numel() + 1)
    return room[1:].view(logits.shape).copy_(logits)


@pytest.mark.parametrize("laid_out", [in_columns, shifted])
def test_logits_that_the_kernels_do_not_take_go_through_torch(laid_out: Any) -> None:
    """A model that lays its logits out in its own way gets the same tokens."""
    rng = random.Random(1)
    found, expected = (make_state(8, 8, 300, CPU) for _ in range(2))
    found.buffers.plain = found.buffers.plain_sampling()
    for step, sampler in enumerate((Sampler.GREEDY, Sampler.GUMBEL)):
        batch = draw_batch(rng, step, ROWS, 8, sampler)
        logits = draw_logits(rng, ROWS, 300, torch.float32, CPU)
        for state in (found, expected):
            fill(state, batch, ROWS)
        run_eagerly(laid_out(logits), found, sampler)
        run_eagerly(logits, expected, sampler)
        assert {state.buffers.note_run() for state in (found, expected)} == {step}
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", list(Sampler))
def test_logits_of_16_bits_give_what_they_give_as_32(sampler: Sampler, dtype: torch.dtype) -> None:
    """Tokens, largest logits and log-probabilities are those of the same numbers in float32, and logits stay as they are."""
    rng = random.Random(2)
    found, expected = (make_state(8, 8, 300, CPU) for _ in range(2))
    for step in range(4):
        batch = draw_batch(rng, step, ROWS, 8, sampler)
        logits = draw_logits(rng, ROWS, 300, dtype, CPU)
        before = logits.clone()
        for state in (found, expected):
            fill(state, batch, ROWS)
        run_eagerly(logits, found, sampler)
        run_eagerly(logits.float(), expected, sampler)
        assert {state.buffers.note_run() for state in (found, expected)} == {step}
        assert_same(found, expected)
        torch.testing.assert_close(found.buffers.top_logprobs, expected.buffers.top_logprobs, rtol=0, atol=0)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_the_cpu_needs_no_triton() -> None:
    """Where there is none a step is sampled all the same; buffers on the CPU ask for no kernels."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from hotgraph_server.batch import Sampler\n"
        "from hotgraph_server.engine.buffers import ALL_WORK, StepBuffers\n"
        "from hotgraph_server.engine.sampler import sample_step\n"
        "from hotgraph_server.engine.slots import SlotTables\n"
        "device = torch.device('cpu')\n"
        "slots = SlotTables(num_slots=2, max_blocks=1, vocabulary_size=9, device=device)\n"
        "buffers = StepBuffers(slots, max_tokens=2, max_rows=2, max_blocks=1, device=device)\n"
        "assert buffers.plain is None\n"
        "for sampler in Sampler:\n"
        "    logits = torch.zeros(1, 9)\n"
        "    logits[0, 4] = 50.0\n"
        "    sample_step(logits, buffers, sampler, ALL_WORK)\n"
        "    assert buffers.results(buffers.note_run(), 1).token_ids == [4]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
