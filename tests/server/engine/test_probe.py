"""Probe steps fill their shape and say the same at a position, whichever row is there."""

from __future__ import annotations

import random

import pytest

from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.engine.probe import ProbeLayout

VOCABULARY = 1000


@pytest.mark.parametrize("seed", range(40))
def test_rows_fill_the_shape_within_the_positions(seed: int) -> None:
    """All tokens and rows are there as far as positions go, rows differ by one token at most, and none share a position."""
    rng = random.Random(seed)
    num_positions = rng.randint(40, 700)
    rows = rng.randint(1, 64)
    tokens = rows * rng.randint(1, max(1, num_positions // rows)) + rng.randint(0, rows - 1)
    key = StepKey(tokens, rows, rng.choice(list(Sampler)))
    layout = ProbeLayout(num_positions=num_positions, vocabulary_size=VOCABULARY)
    batch = layout.batch(key, 7)
    lengths = [row.num_tokens for row in batch.rows]
    assert sum(lengths) == min(tokens, num_positions)
    assert len(lengths) == min(rows, num_positions)
    assert max(lengths) - min(lengths) <= 1
    seen: set[int] = set()
    for row in batch.rows:
        assert row.slot == 7
        assert row.token_ids is not None
        assert row.start >= 0
        assert row.start + row.num_tokens <= num_positions
        assert all(0 <= token_id < VOCABULARY for token_id in row.token_ids)
        positions = range(row.start, row.start + row.num_tokens)
        assert seen.isdisjoint(positions)
        seen.update(positions)


@pytest.mark.parametrize("seed", range(20))
def test_no_row_sees_what_an_earlier_probe_left(seed: int) -> None:
    """Between the prefix, which nothing writes, and a row's first token, every position is written by this very step."""
    rng = random.Random(seed)
    rows = rng.randint(1, 64)
    key = StepKey(rows * rng.randint(1, 20), rows, Sampler.GREEDY)
    batch = ProbeLayout(num_positions=rng.randint(100, 400), vocabulary_size=VOCABULARY).batch(key, 0)
    prefix = min(row.start for row in batch.rows)
    written = {position for row in batch.rows for position in range(row.start, row.start + row.num_tokens)}
    for row in batch.rows:
        assert set(range(prefix, row.start)) <= written


def test_what_does_not_fit_is_padding() -> None:
    """A bucket beyond the context is filled as far as a prompt can fill it."""
    layout = ProbeLayout(num_positions=40, vocabulary_size=VOCABULARY)
    batch = layout.batch(StepKey(64, 1, Sampler.GREEDY), 0)
    assert [(row.start, row.num_tokens) for row in batch.rows] == [(0, 40)]
    batch = layout.batch(StepKey(128, 2, Sampler.GREEDY), 0)
    assert [(row.start, row.num_tokens) for row in batch.rows] == [(0, 20), (20, 20)]
    assert len(layout.batch(StepKey(64, 64, Sampler.GREEDY), 0).rows) == 40
    with pytest.raises(ValueError, match="too few"):
        ProbeLayout(num_positions=1, vocabulary_size=VOCABULARY)
