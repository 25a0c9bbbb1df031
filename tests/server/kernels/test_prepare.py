"""kernels/prepare.py against a loop over rows and tokens."""

from __future__ import annotations

import random

from hotgraph_server.kernels.prepare import prepare_step
from tests.server.kernels.prepare_steps import BLOCK_SIZE, random_step


def test_equals_a_loop() -> None:
    """Rows of every kind, with and without padding and changes of their slots, give what a plain loop gives; and each slot
    is as it was but for what the stage says of it."""
    rng = random.Random(2)
    for _ in range(60):
        step = random_step(rng)
        prepare_step(step.source, **step.results, block_size=BLOCK_SIZE)
        assert {name: result.tolist() for name, result in step.results.items()} == step.expected
        assert step.source.block_tables.tolist() == step.tables
        assert step.source.parameters.tolist() == step.parameters
