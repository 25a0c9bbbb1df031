"""kernels/prepare.py against a loop over rows and tokens."""

from __future__ import annotations

import random

import pytest

from hotgraph_server.kernels.prepare import prepare_step
from tests.server.kernels.prepare_steps import BLOCK_SIZE, random_step


@pytest.mark.parametrize("has_slot_lens", [False, True], ids=["starts given", "starts from slots"])
def test_equals_a_loop(has_slot_lens: bool) -> None:
    """Decode and prefill rows in any slots, with and without padding, give what a plain loop gives."""
    rng = random.Random(2)
    for _ in range(40):
        step = random_step(rng, has_slot_lens=has_slot_lens)
        prepare_step(**step.inputs, **step.results, block_size=BLOCK_SIZE)
        assert {name: result.tolist() for name, result in step.results.items()} == step.expected
