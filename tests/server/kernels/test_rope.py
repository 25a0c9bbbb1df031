"""Rotary position embedding against a loop over pairs."""

from __future__ import annotations

import math

import pytest
import torch

from hotgraph_server.kernels.rope import apply_rope, rotary_factors, rotary_table

FREQUENCIES = torch.tensor([1.0, 0.3, 0.02])


def turned(vector: list[float], position: int, scaling: float) -> list[float]:
    """One head turned pair by pair: elements i and i + 3 of the first six."""
    result = list(vector)
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        angle = position * frequency
        first, second = vector[i], vector[i + 3]
        result[i] = scaling * (first * math.cos(angle) - second * math.sin(angle))
        result[i + 3] = scaling * (second * math.cos(angle) + first * math.sin(angle))
    return result


@pytest.mark.parametrize("head_dim", [6, 9])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_pairs_are_turned_by_their_position(head_dim: int, scaling: float) -> None:
    """Each token's heads are turned by its own position; elements beyond the frequencies stay."""
    positions = torch.tensor([0, 5, 1, 199])
    x = torch.randn(4, 2, head_dim, generator=torch.Generator().manual_seed(0))
    factors = rotary_factors(rotary_table(FREQUENCIES, scaling, 200), positions, torch.float32)
    expected = [[turned(head, int(positions[t]), scaling) for head in token] for t, token in enumerate(x.tolist())]
    torch.testing.assert_close(apply_rope(x, factors), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_strided_view_is_turned_alike() -> None:
    """Queries and keys may be a slice of a wider product."""
    wide = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    factors = rotary_factors(rotary_table(FREQUENCIES, 1.0, 10), torch.tensor([1, 2, 3]), torch.float32)
    assert torch.equal(apply_rope(wide[:, 1:4], factors), apply_rope(wide[:, 1:4].contiguous(), factors))


def test_scores_depend_on_distance_only() -> None:
    """The product of a turned query and key is the same wherever the pair stands."""
    query, key = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(2))
    table = rotary_table(FREQUENCIES, 1.0, 100)

    def score(query_position: int, key_position: int) -> float:
        ends = [
            apply_rope(x, rotary_factors(table, torch.tensor([position]), torch.float32))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float((ends[0] * ends[1]).sum())

    assert score(7, 3) == pytest.approx(score(90, 86), abs=1e-4)
