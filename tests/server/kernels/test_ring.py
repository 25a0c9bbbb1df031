"""The ring holds the last runs' results, each in the place of its number."""

from __future__ import annotations

import random

import torch

from hotgraph_server.kernels.ring import write_ring

DEPTH, MAX_ROWS = 3, 8


def test_the_last_runs_stand_in_their_places() -> None:
    """After any number of runs the ring holds the results of the last `depth`, with their numbers; all are counted."""
    rng = random.Random(0)
    ring_ids = torch.full((DEPTH, 1 + MAX_ROWS), -7)
    ring_values = torch.full((DEPTH, 2, MAX_ROWS), torch.nan)
    counter = torch.zeros(1, dtype=torch.int64)
    runs = []
    for number in range(11):
        num_rows = rng.randint(1, MAX_ROWS)
        ids, values = torch.randint(-1, 50_000, (num_rows,)), torch.randn(2, MAX_ROWS)[:, :num_rows]
        write_ring(ring_ids, ring_values, counter, ids, values)
        runs.append((ids, values))
        assert counter.item() == number + 1
        for earlier in range(max(0, number - DEPTH + 1), number + 1):
            place, (wanted_ids, wanted_values) = earlier % DEPTH, runs[earlier]
            assert ring_ids[place, 0] == earlier
            assert torch.equal(ring_ids[place, 1 : 1 + len(wanted_ids)], wanted_ids)
            assert torch.equal(ring_values[place, :, : len(wanted_ids)], wanted_values)
