"""kernels/sample.py against the naive sampler, row by row."""

from __future__ import annotations

import random

import pytest
import torch

from hotgraph_server.kernels import sample as sample_kernel
from hotgraph_server.kernels.sample import RowSampling, row_peaks, sample_filtered, sample_greedy, sample_gumbel
from tests.server.kernels import naive_sampling


def random_rows(rng: random.Random, num_rows: int) -> tuple[RowSampling, list[dict[str, float]]]:
    """Parameters of rows of every kind, as tensors and as the naive sampler's arguments."""
    rows: list[dict[str, float]] = []
    for _ in range(num_rows):
        kind = rng.choice(["greedy", "plain", "filtered", "filtered"])
        is_filtered = kind == "filtered"
        rows.append(
            {
                "temperature": 0.0 if kind == "greedy" else round(rng.uniform(0.05, 2.0), 3),
                "top_k": rng.choice([0, 1, 5, 40, 70, 1030]) if is_filtered else 0,
                "top_p": rng.choice([1.0, 0.1, 0.5, 0.9, 0.99]) if is_filtered else 1.0,
                "min_p": rng.choice([0.0, 0.02, 0.3]) if is_filtered else 0.0,
                "seed": rng.getrandbits(64),
                "position": rng.randrange(5000),
            }
        )
    return as_tensors(rows), rows


def as_tensors(rows: list[dict[str, float]]) -> RowSampling:
    """The kernel's parameters."""
    seeds = [int(row["seed"]) for row in rows]
    return RowSampling(
        temperature=torch.tensor([row["temperature"] for row in rows]),
        top_k=torch.tensor([int(row["top_k"]) for row in rows]),
        top_p=torch.tensor([row["top_p"] for row in rows]),
        min_p=torch.tensor([row["min_p"] for row in rows]),
        seeds=torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds]),
        positions=torch.tensor([int(row["position"]) for row in rows]),
    )


@pytest.mark.parametrize("vocabulary_size", [50, 300, 3000])
def test_filtered_equals_the_naive_sampler(vocabulary_size: int) -> None:
    """Rows of all kinds in one batch, flat and peaked, give the tokens that the reference gives for each alone."""
    rng = random.Random(vocabulary_size)
    for scale in (0.3, 2.0, 10.0):
        sampling, rows = random_rows(rng, 10)
        logits = torch.randn(10, vocabulary_size) * scale
        expected = [naive_sampling.sample(logits[i].tolist(), **row) for i, row in enumerate(rows)]  # type: ignore[arg-type]
        assert sample_filtered(logits, sampling).tolist() == expected


def test_gumbel_equals_the_naive_sampler() -> None:
    """Temperature rows and greedy rows in one batch give the reference's tokens."""
    rng = random.Random(5)
    sampling, rows = random_rows(rng, 12)
    logits = torch.randn(12, 400) * 3
    for row in rows:
        row.update({"top_k": 0, "top_p": 1.0, "min_p": 0.0})
    expected = [naive_sampling.sample(logits[i].tolist(), **row) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    assert sample_gumbel(logits, sampling).tolist() == expected


def test_greedy_takes_the_first_of_equals() -> None:
    """Greedy is the argmax; of equal logits the smallest token id wins, in all three samplers."""
    logits = torch.zeros(1, 90)
    logits[0, [30, 70]] = 2.0
    sampling = as_tensors([{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "position": 2}])
    assert sample_greedy(logits).tolist() == [30]
    assert sample_gumbel(logits, sampling).tolist() == [30]
    assert sample_filtered(logits, sampling).tolist() == [30]


def test_samplers_agree_where_they_overlap() -> None:
    """The filtered sampler gives the gumbel sampler's tokens when no filter is on: a stronger graph changes no text."""
    rows = [
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed, "position": 9} for seed in range(8)
    ]
    logits = torch.randn(8, 2000)
    assert torch.equal(sample_gumbel(logits, as_tensors(rows)), sample_filtered(logits, as_tensors(rows)))


def test_candidates_give_what_the_full_sort_gives() -> None:
    """The fast path through few candidates and the full sort choose the same tokens."""
    rng = random.Random(8)
    for _ in range(10):
        sampling, rows = random_rows(rng, 8)
        sampling = as_tensors([{**row, "temperature": row["temperature"] or 0.5} for row in rows])
        logits = torch.randn(8, 5000) * rng.choice([0.5, 3.0, 8.0])
        expected = sample_kernel._filtered_by_sort(logits, sampling)
        assert torch.equal(sample_filtered(logits, sampling), expected)


def test_device_ways_give_what_the_cpu_gives() -> None:
    """What a device runs, which reads nothing back, chooses the tokens that the CPU's sorted rows choose."""
    rng = random.Random(9)
    for _ in range(10):
        sampling, _ = random_rows(rng, 8)
        logits = torch.randn(8, 2000) * rng.choice([0.5, 3.0, 8.0])
        assert torch.equal(sample_kernel._filtered_blind(logits, sampling), sample_filtered(logits, sampling))
        assert torch.equal(sample_kernel._gumbel_blind(logits, sampling), sample_gumbel(logits, sampling))


def test_row_is_the_same_alone_and_among_others() -> None:
    """A row's token does not depend on the rows beside it or on its place."""
    sampling, rows = random_rows(random.Random(21), 8)
    logits = torch.randn(8, 3000) * 2
    together = sample_filtered(logits, sampling).tolist()
    backwards = list(reversed(range(8)))
    assert sample_filtered(logits[backwards], sampling.take(torch.tensor(backwards))).tolist() == together[::-1]
    for row in range(8):
        assert (
            sample_filtered(logits[row : row + 1], as_tensors(rows[row : row + 1])).tolist() == together[row : row + 1]
        )


def test_peaks_are_finite_where_a_row_can_be_sampled() -> None:
    """NaN or plus infinity anywhere spoils a row; minus infinity only when nothing else is left to choose."""
    logits = torch.randn(6, 1000)
    logits[1, 999] = torch.nan
    logits[2, 0] = torch.inf
    logits[3, 500] = -torch.inf
    logits[4] = -torch.inf
    logits[5, 3], logits[5, 4] = torch.inf, -torch.inf
    assert row_peaks(logits).isfinite().tolist() == [True, False, False, True, False, False]
