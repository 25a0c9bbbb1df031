"""Rotary position embedding: turns pairs of a head's elements by the token's position. It knows no model's frequencies.

A pair is element i and element i + n/2 of the first n elements of a head, as in the checkpoints of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def rotary_table(inverse_frequencies: torch.Tensor, scaling: float, num_positions: int) -> torch.Tensor:
    """Cosines and sines of every position: float32 [num_positions, n], cosines in the first half, sines in the second.

    inverse_frequencies: float32 [n/2], radians a position. Both halves are multiplied by `scaling`.
    """
    positions = torch.arange(num_positions, device=inverse_frequencies.device, dtype=torch.float32)
    angles = positions.unsqueeze(-1) * inverse_frequencies.float()
    return torch.cat((angles.cos().mul_(scaling), angles.sin_().mul_(scaling)), dim=-1)


def rotary_factors(
    table: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `apply_rope` multiplies with, once a step for all layers: two tensors [T, 1, n] of `dtype`.

    table: from `rotary_table`; positions: int64 [T]. The first holds the cosines twice, the second minus the sines and
    then the sines, so that the turn is `x * first + swapped_halves(x) * second`.
    """
    cosines, sines = table.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


@dataclass(frozen=True, slots=True)
class RopePlan:
    """How far one step's tokens are turned, made once and used by every layer. Make it with `for_step`.

    `table`: from `rotary_table`; `positions`: int64 [T]; `factors`: from `rotary_factors`, None on a GPU, where the kernel
    reads the table.
    """

    table: torch.Tensor
    positions: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def for_step(cls, table: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> RopePlan:
        """For queries and keys of `dtype`."""
        return cls(table, positions, None if table.is_cuda else rotary_factors(table, positions, dtype))


def apply_rope(x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns the first n elements of every head; the others stay. x: [T, heads, d] with d >= n; a new tensor, contiguous.

    factors: from `rotary_factors`, of x's dtype.

    Source: Su et al., "RoFormer", 2021, in the half-split order of transformers' `rotate_half`.
    """
    cosines, sines = factors
    num_turned = cosines.shape[-1]
    if num_turned == x.shape[-1]:
        return (x * cosines).addcmul_(torch.roll(x, num_turned // 2, dims=-1), sines)
    turned, kept = x[..., :num_turned], x[..., num_turned:]
    turned = (turned * cosines).addcmul_(torch.roll(turned, num_turned // 2, dims=-1), sines)
    return torch.cat((turned, kept), dim=-1)
