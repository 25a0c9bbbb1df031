"""The noise of kernels/noise.py: equal to the naive chain, distributed as it should, a function of its own row only."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.kernels import noise as noise_kernel
from hotgraph_server.kernels.noise import gumbel_noise, row_keys
from tests.server.kernels import naive_sampling

VOCABULARY = 49152


def halves(*seeds: int) -> torch.Tensor:
    """Seeds as the kernels take them."""
    return torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds], dtype=torch.int64)


def uniforms(noise: torch.Tensor) -> torch.Tensor:
    """The uniform numbers that the noise was made of, float64."""
    return -torch.expm1(-torch.exp(-noise.double()))


def normal_of_chi_square(statistic: float, degrees: int) -> float:
    """Wilson and Hilferty's approximation: about standard normal when the hypothesis holds."""
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, 300_000), min_size=1, max_size=20),
)
def test_equals_the_naive_chain(seed: int, position: int, token_ids: list[int]) -> None:
    """Every element is the number that the documented chain gives in plain integers."""
    noise = gumbel_noise(halves(seed), torch.tensor([position]), 300_001, torch.tensor([token_ids]))
    expected = [naive_sampling.gumbel(seed, position, token_id) for token_id in token_ids]
    assert noise.shape == (1, len(token_ids))
    torch.testing.assert_close(noise[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", [row_keys, noise_kernel._row_keys])
def test_row_keys_equal_the_naive_ones(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The keys are those of plain integers, also at the ends of the ranges, on the host and as a device computes them."""
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    positions = [0, 1, 2**31 - 1, 12345, 7, 2**20]
    keys = function(halves(*seeds), torch.tensor(positions))
    assert keys.dtype == torch.int32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert [key & 0xFFFFFFFF for key in keys[row].tolist()] == naive_sampling.row_keys(seed, position)


def test_row_depends_on_nothing_but_itself() -> None:
    """A row's noise is bit for bit the same alone, among others, in any place, and for chosen tokens only."""
    seeds = halves(*[seed * 0x9E3779B97F4A7C15 & (2**64 - 1) for seed in range(11)])
    positions = torch.arange(11) * 17
    together = gumbel_noise(seeds, positions, VOCABULARY)
    for row in (0, 3, 10):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], VOCABULARY)
        assert torch.equal(alone[0], together[row])
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:700].repeat(11, 1)
    assert torch.equal(gumbel_noise(seeds, positions, VOCABULARY, ids), together.gather(1, ids))


def test_is_finite_and_has_the_gumbel_moments() -> None:
    """Mean is Euler's constant and variance pi squared over six, within five standard errors; nothing is infinite."""
    noise = gumbel_noise(halves(*range(64)), torch.arange(64), VOCABULARY).double()
    assert bool(noise.isfinite().all())
    error = math.sqrt(math.pi**2 / 6 / noise.numel())
    assert abs(noise.mean().item() - 0.5772156649) < 5 * error
    assert abs(noise.var().item() - math.pi**2 / 6) < 5 * math.sqrt(4.4 - 1) * math.pi**2 / 6 / math.sqrt(noise.numel())


@pytest.mark.parametrize("axis", ["tokens", "positions", "low seeds", "high seeds"])
def test_uniform_along_every_axis(axis: str) -> None:
    """Along tokens, positions and both halves of the seed the numbers fill 256 bins evenly (chi-square, |z| < 5)."""
    count = 1 << 17
    line = torch.arange(count)
    zero = torch.zeros(count, dtype=torch.int64)
    if axis == "tokens":
        noise = gumbel_noise(halves(7), torch.tensor([3]), count)[0]
    else:
        seeds = torch.stack([line if axis == "low seeds" else zero, line if axis == "high seeds" else zero], dim=1)
        positions = line if axis == "positions" else zero
        noise = gumbel_noise(seeds, positions, 100, torch.full((count, 1), 42))[:, 0]
    bins = torch.histc(uniforms(noise), bins=256, min=0, max=1)
    expected = count / 256
    statistic = ((bins - expected) ** 2 / expected).sum().item()
    assert abs(normal_of_chi_square(statistic, 255)) < 5


def test_neighbours_are_independent() -> None:
    """Numbers of neighbouring tokens, positions and seeds, and of the same token under shifted rows, do not correlate."""
    size = 1 << 15
    base = uniforms(gumbel_noise(halves(5), torch.tensor([10]), size))[0]
    others = {
        "next token": base.roll(1),
        "token two apart": base.roll(2),
        "next position": uniforms(gumbel_noise(halves(5), torch.tensor([11]), size))[0],
        "next seed": uniforms(gumbel_noise(halves(6), torch.tensor([10]), size))[0],
        "seed and position swapped": uniforms(gumbel_noise(halves(10), torch.tensor([5]), size))[0],
        "next high word": uniforms(gumbel_noise(halves(5 + 2**32), torch.tensor([10]), size))[0],
        "next choice": uniforms(gumbel_noise(halves(5 + 0x9E3779B97F4A7C15), torch.tensor([10]), size))[0],
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(size), name
        # Beyond correlation: the pairs fill a 16 x 16 grid evenly.
        cells = (base * 16).long().clamp(max=15) * 16 + (other * 16).long().clamp(max=15)
        counts = torch.bincount(cells, minlength=256).double()
        statistic = ((counts - size / 256) ** 2 / (size / 256)).sum().item()
        assert abs(normal_of_chi_square(statistic, 255)) < 5, name


def test_tail_is_not_cut_off() -> None:
    """Among 2**27 numbers those beyond the reach of 24 bits come as often as they should, and their fractions differ."""
    num_rows, size = 1 << 10, 1 << 17
    extremes: list[torch.Tensor] = []
    limit = -math.log(-math.log1p(-(2.0**-24)))
    for start in range(0, num_rows, 16):
        rows = torch.arange(start, start + 16)
        noise = gumbel_noise(torch.stack([rows, rows * 0], dim=1), rows, size)
        extremes.append(noise[noise > limit])
    found = torch.cat(extremes)
    expected = num_rows * size * 2.0**-24  # 8
    assert expected / 4 < len(found) < expected * 4
    assert len(set(found.tolist())) == len(found)


def test_argmax_follows_the_softmax() -> None:
    """Over many positions the argmax of logits plus noise is distributed as their softmax (chi-square, z < 5)."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 200_000
    positions = torch.arange(count)
    ids = torch.arange(40).repeat(count, 1)
    noise = gumbel_noise(halves(99).expand(count, -1), positions, 40, ids)
    counts = torch.bincount((logits + noise).argmax(dim=1), minlength=40).double()
    expected = torch.softmax(logits.double(), dim=0) * count
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert normal_of_chi_square(statistic, 39) < 5
